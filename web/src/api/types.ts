/** Names for what the API takes and answers; all of it comes from the server's OpenAPI document. */
import type { components, paths } from "./schema";

type Schemas = components["schemas"];

export type Volume = Schemas["VolumeAnswer"];
export type Location = Schemas["LocationAnswer"];
export type Job = Schemas["JobAnswer"];
export type Health = Schemas["HealthAnswer"];
export type Binned = Schemas["BinnedAnswer"];
export type Export = Schemas["ExportAnswer"];
export type ListedExport = Schemas["ExportListAnswer"];
export type Migration = Schemas["MigrationAnswer"];
export type Upload = Schemas["UploadAnswer"];
export type WhoAmI = Schemas["WhoAmIAnswer"];
export type History = Schemas["HistoryAnswer"];
export type Metadata = Schemas["MetadataAnswer"];
export type Snapshot = Schemas["SnapshotAnswer"];

type Prefix = "/api/v1.0/";
type Post<P> = P extends keyof paths ? NonNullable<paths[P]["post"]> : never;

/** Calls: POST with JSON that answers JSON. */
export type CallName = {
  [P in keyof paths]: P extends `${Prefix}${infer Name}`
    ? paths[P] extends { post: { responses: { 200: { content: { "application/json": unknown } } } } }
      ? Name
      : never
    : never;
}[keyof paths];

export type Body<N extends CallName> =
  Post<`${Prefix}${N}`> extends { requestBody?: { content: { "application/json": infer B } } } ? B : never;

export type Answer<N extends CallName> =
  Post<`${Prefix}${N}`> extends { responses: { 200: { content: { "application/json": infer A } } } } ? A : never;
