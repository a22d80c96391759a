import { Button, Card, CardBody, CardTitle, Content, Label } from "@patternfly/react-core";
import { type ReactNode, useState } from "react";
import { call } from "../api/client";
import type { Export, ListedExport, Volume } from "../api/types";
import { exportsRevision } from "../state/live";
import { useResource } from "../state/resource";
import { clientOf, mayChange } from "../state/session";
import { useStore } from "../state/store";
import { failed, toast } from "../state/toasts";
import { volumeChanged } from "../state/volumes";
import { bytes, shortUid } from "../ui/format";
import { useSession } from "../ui/session-context";
import { ShowAttach } from "./dialogs/ExportVolume";
import { MigrateVolume } from "./dialogs/MigrateVolume";
import { Alert } from "../ui/Note";

const EVERY_MS = 5000;

function changed(volumeId: string): void {
  exportsRevision.update((count) => count + 1);
  volumeChanged(volumeId);
}

/** To whom the volume is exported, how that is, and the way of a guest to another host. */
export function VolumeExports({ volume }: { volume: Volume }): ReactNode {
  const session = useSession();
  const revision = useStore(exportsRevision);
  const client = clientOf(session);
  const listed = useResource(
    () => call("exports", { volume_id: volume.volumeID, ...(client === undefined ? {} : { client_uid: client }) }),
    `${volume.volumeID} ${revision}`,
    EVERY_MS,
  );
  const exports = listed.value?.exports ?? [];
  const migration = exports.find((one) => one.migration !== null)?.migration ?? null;
  return (
    <Card isCompact>
      <CardTitle component="h2">Exports</CardTitle>
      <CardBody>
        {listed.error !== null && <Alert variant="danger" title={listed.error} />}
        {exports.length === 0 && (
          <Content component="p" className="es-muted">
            Nobody reaches it now.
          </Content>
        )}
        {migration !== null && <Migrating id={migration} volume={volume} />}
        <ul className="es-items">
          {exports.map((one) => (
            <ExportItem key={one.client_uid} one={one} volume={volume} isMigrating={migration !== null} />
          ))}
        </ul>
      </CardBody>
    </Card>
  );
}

export function ExportState({ one }: { one: ListedExport }): ReactNode {
  const isGood = one.state === "healthy";
  return (
    <Label status={isGood ? "success" : "warning"} isCompact>
      {one.state}
    </Label>
  );
}

function ExportItem(props: { one: ListedExport; volume: Volume; isMigrating: boolean }): ReactNode {
  const { one, volume, isMigrating } = props;
  const session = useSession();
  const [attach, setAttach] = useState<Export | null>(null);
  const [migrating, setMigrating] = useState(false);
  const client = one.client_uid;
  const mine = clientOf(session) === undefined || clientOf(session) === client;
  const told = [
    one.readonly === true && "read-only",
    one.sessions !== null && `${one.sessions} connected`,
    one.read_bytes !== null && `${bytes(one.read_bytes)} read`,
    one.written_bytes !== null && `${bytes(one.written_bytes)} written`,
    one.latency_ms !== null && `answers in ${one.latency_ms} ms`,
  ].filter((text): text is string => typeof text === "string");
  const show = async (): Promise<void> => {
    if (client === null || one.protocol === null) return;
    try {
      const protocol = one.protocol as Export["protocol"];
      setAttach(await call("export", { volume_id: volume.volumeID, client_uid: client, protocol }));
    } catch (error) {
      failed("The commands cannot be had", error);
    }
  };
  const end = async (): Promise<void> => {
    if (client === null) return;
    try {
      await call("unexport", { volume_id: volume.volumeID, client_uid: client });
      toast("success", `${volume.name} was taken from ${shortUid(client)}`);
    } catch (error) {
      failed("It is exported still", error);
    }
    changed(volume.volumeID);
  };
  return (
    <li className="es-item">
      <div>
        <strong>{one.protocol ?? "unknown"}</strong> to <code title={client ?? ""}>{client === null ? "?" : shortUid(client)}</code>{" "}
        <ExportState one={one} />
        <div className="es-muted es-small">{told.join(" · ")}</div>
        {one.reason !== null && <div className="es-small">{one.reason}</div>}
      </div>
      <div className="es-actions">
        {mine && one.protocol !== null && (
          <Button variant="secondary" size="sm" onClick={() => void show()}>
            How to attach
          </Button>
        )}
        {mayChange(session, volume) && !isMigrating && client !== null && (
          <Button variant="secondary" size="sm" onClick={() => setMigrating(true)}>
            Migrate…
          </Button>
        )}
        {!isMigrating && (
          <Button variant="secondary" isDanger size="sm" onClick={() => void end()}>
            End
          </Button>
        )}
      </div>
      {attach !== null && <ShowAttach made={attach} name={volume.name} onClose={() => setAttach(null)} />}
      {migrating && client !== null && (
        <MigrateVolume volume={volume} source={client} onClose={() => setMigrating(false)} onPrepared={() => changed(volume.volumeID)} />
      )}
    </li>
  );
}

function Migrating({ id, volume }: { id: string; volume: Volume }): ReactNode {
  const [busy, setBusy] = useState(false);
  const end = async (how: "livemigration/conclude" | "livemigration/revert"): Promise<void> => {
    setBusy(true);
    try {
      await call(how, { migration: id });
      toast("success", how.endsWith("revert") ? "The guest stays where it was" : "The guest has moved: its old host has no way in any more");
    } catch (error) {
      failed("The migration is not over", error);
    }
    setBusy(false);
    changed(volume.volumeID);
  };
  return (
    <Alert
      variant="info"
      title="A guest is moving to another host"
      actionLinks={
        <>
          <Button size="sm" isDisabled={busy} onClick={() => void end("livemigration/conclude")}>
            It has moved: conclude
          </Button>
          <Button size="sm" variant="secondary" isDisabled={busy} onClick={() => void end("livemigration/revert")}>
            It stays: revert
          </Button>
        </>
      }
    >
      Both hosts reach the disk until you say how it ended.
    </Alert>
  );
}
