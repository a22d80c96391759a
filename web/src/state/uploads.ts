import * as tus from "tus-js-client";
import { address, authorization, call, request } from "../api/client";
import type { Upload } from "../api/types";
import { Store } from "./store";
import { toast } from "./toasts";
import { volumeChanged } from "./volumes";

/** One file on its way to the server. It goes on while other views are shown; a reload breaks it off. */
export interface Sending {
  id: number;
  name: string;
  size: number;
  sent: number;
  /** Bytes per second, of late. */
  rate: number;
  state: "sending" | "paused" | "finishing" | "done" | "failed";
  error: string | null;
  volumeId: string | null;
}

/** An upload of this browser that a reload, or a lost connection, has broken off. */
export interface BrokenOff {
  uploadId: string;
  url: string;
  storageKey: string;
  name: string;
  fileName: string;
  offset: number;
  size: number;
}

export const sendings = new Store<readonly Sending[]>([]);

const ENDPOINT = address("uploads");
const RETRY_MS = [0, 1000, 2000, 5000, 10_000, 20_000, 30_000];
const RATE_MS = 3000;

const running = new Map<number, tus.Upload>();
let last = 0;

function patch(id: number, change: Partial<Sending>): void {
  sendings.update((before) => before.map((one) => (one.id === id ? { ...one, ...change } : one)));
}

/** Begin to send a file. `metadata` is what the volume shall be. */
export async function send(file: File, metadata: Readonly<Record<string, string>>): Promise<void> {
  await start(file, metadata.name ?? file.name, { ...metadata, filename: file.name }, null);
}

/** Go on with an upload that was broken off. The file has to be the very one: a mixture of two would be no image at all. */
export async function goOn(file: File, one: BrokenOff): Promise<void> {
  const ours = `tus::${fingerprintOf(file)}::`;
  if (!one.storageKey.startsWith(ours)) {
    throw new Error(`This is not the file that was begun, or it was changed since: choose ${one.fileName} again.`);
  }
  await start(file, one.name, {}, one);
}

function fingerprintOf(file: File): string {
  return ["tus-br", file.name, file.type, file.size, file.lastModified, ENDPOINT].join("-");
}

function start(file: File, name: string, metadata: Record<string, string>, before: BrokenOff | null): Promise<void> {
  const id = ++last;
  const offset = before?.offset ?? 0;
  const fresh: Sending = {
    id,
    name,
    size: file.size,
    sent: offset,
    rate: 0,
    state: "sending",
    error: null,
    volumeId: null,
  };
  sendings.update((all) => [...all, fresh]);
  let mark = { at: performance.now(), sent: offset };
  const upload = new tus.Upload(file, {
    endpoint: ENDPOINT,
    ...(before === null ? {} : { uploadUrl: before.url }),
    metadata,
    retryDelays: RETRY_MS,
    removeFingerprintOnSuccess: true,
    fingerprint: (chosen) => Promise.resolve(fingerprintOf(chosen as File)),
    // The answer to the last byte would otherwise wait until the volume is made of what was sent.
    headers: { Prefer: "respond-async" },
    onBeforeRequest: (outgoing) => {
      for (const [key, value] of Object.entries(authorization())) outgoing.setHeader(key, value);
    },
    onProgress: (sent) => {
      const now = performance.now();
      if (now - mark.at > RATE_MS) {
        patch(id, { rate: ((sent - mark.sent) * 1000) / (now - mark.at) });
        mark = { at: now, sent };
      }
      patch(id, { sent });
    },
    onSuccess: ({ lastResponse }) => {
      running.delete(id);
      const uploadId = (upload.url ?? "").split("/").pop() ?? "";
      const volumeId = lastResponse.getHeader("Elemento-Volume");
      if (volumeId) finished(id, name, volumeId);
      else {
        patch(id, { state: "finishing", sent: file.size });
        void settle(id, uploadId);
      }
    },
    onError: (error) => {
      running.delete(id);
      patch(id, { state: "failed", error: sentenceOf(error) });
    },
  });
  if (before !== null) void tus.defaultOptions.urlStorage.removeUpload(before.storageKey).then(() => remember(file, upload, metadata, before));
  running.set(id, upload);
  upload.start();
  return Promise.resolve();
}

/** tus-js-client forgets an upload that is given by its address: keep it, should it be broken off again. */
async function remember(file: File, upload: tus.Upload, metadata: Record<string, string>, before: BrokenOff): Promise<void> {
  await tus.defaultOptions.urlStorage.addUpload(fingerprintOf(file), {
    size: file.size,
    metadata: { ...metadata, name: before.name, filename: before.fileName },
    creationTime: new Date().toString(),
    urlStorageKey: "",
    uploadUrl: upload.url ?? before.url,
    parallelUploadUrls: null,
  });
}

function sentenceOf(error: Error | tus.DetailedError): string {
  const body = "originalResponse" in error ? error.originalResponse?.getBody() : undefined;
  if (body) {
    try {
      const said = (JSON.parse(body) as { error?: string }).error;
      if (said) return said;
    } catch {
      // Not one of the server's own answers.
    }
  }
  return "originalResponse" in error && error.originalResponse === null ? "The server does not answer." : error.message;
}

/** Everything has arrived; the server makes a volume of it. */
async function settle(id: number, uploadId: string): Promise<void> {
  for (;;) {
    await new Promise((resolve) => window.setTimeout(resolve, 500));
    const response = await request(`${ENDPOINT}/${uploadId}`).catch(() => null);
    if (response === null) return;
    const upload = (await response.json()) as Upload;
    if (upload.state === "done") {
      finished(id, sendings.get().find((one) => one.id === id)?.name ?? "", upload.vid ?? uploadId);
      return;
    }
    if (upload.state === "failed") {
      patch(id, { state: "failed", error: upload.error?.error ?? "no volume could be made of it" });
      return;
    }
  }
}

function finished(id: number, name: string, volumeId: string): void {
  const was = sendings.get().find((one) => one.id === id);
  patch(id, { state: "done", sent: was?.size ?? 0, volumeId });
  volumeChanged(volumeId);
  toast("success", `${name} was uploaded`);
}

export async function pause(id: number): Promise<void> {
  await running.get(id)?.abort();
  patch(id, { state: "paused", rate: 0 });
}

export function resume(id: number): void {
  running.get(id)?.start();
  patch(id, { state: "sending" });
}

/** Stop it, and have the server remove what has arrived. */
export async function giveUp(id: number): Promise<void> {
  const upload = running.get(id);
  running.delete(id);
  sendings.update((before) => before.filter((one) => one.id !== id));
  await upload?.abort(true);
}

export function forget(id: number): void {
  sendings.update((before) => before.filter((one) => one.id !== id));
}

/** What this browser has begun, the server still waits for, and nobody sends. */
export async function brokenOff(client: string | undefined): Promise<BrokenOff[]> {
  const response = await request(address("uploads", { client_uid: client }));
  const onServer = new Map(((await response.json()) as Upload[]).map((one) => [one.upload_id, one]));
  const inHand = new Set([...running.values()].map((upload) => upload.url));
  const found: BrokenOff[] = [];
  for (const kept of await tus.defaultOptions.urlStorage.findAllUploads()) {
    const url = kept.uploadUrl;
    if (url === null || inHand.has(url)) continue;
    const uploadId = url.split("/").pop() ?? "";
    const upload = onServer.get(uploadId);
    if (upload === undefined || upload.state !== "receiving") continue;
    found.push({
      uploadId,
      url,
      storageKey: kept.urlStorageKey,
      name: kept.metadata.name ?? kept.metadata.filename ?? uploadId,
      fileName: kept.metadata.filename ?? "",
      offset: upload.offset,
      size: upload.length ?? kept.size ?? 0,
    });
  }
  return found;
}

export async function discard(one: BrokenOff): Promise<void> {
  await request(one.url, { method: "DELETE", headers: { "Tus-Resumable": "1.0.0" } });
  await tus.defaultOptions.urlStorage.removeUpload(one.storageKey);
}

/** Whether a volume of this size would find room anywhere. */
export async function hasRoom(size: number): Promise<boolean> {
  return (await call("cancreate", { size: Math.max(size, 512) / 1e9 })).cancreate;
}
