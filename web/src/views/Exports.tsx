import { Content, EmptyState, EmptyStateBody } from "@patternfly/react-core";
import type { ReactNode } from "react";
import { call } from "../api/client";
import { exportsRevision } from "../state/live";
import { useResource } from "../state/resource";
import { clientOf } from "../state/session";
import { useStore } from "../state/store";
import { volumes } from "../state/volumes";
import { bytes, number, shortUid, time } from "../ui/format";
import { href } from "../ui/route";
import { useSession } from "../ui/session-context";
import { View } from "../ui/View";
import { ExportState } from "./VolumeExports";
import { Alert } from "../ui/Note";

const EVERY_MS = 5000;

export default function Exports(): ReactNode {
  const session = useSession();
  const client = clientOf(session);
  const revision = useStore(exportsRevision);
  const { byId } = useStore(volumes);
  const listed = useResource(
    () => call("exports", client === undefined ? {} : { client_uid: client }),
    `exports ${revision}`,
    EVERY_MS,
  );
  const exports = listed.value?.exports;
  return (
    <View title="Exports" intro="Volumes that clients reach. They come back by themselves when the server or a daemon dies.">
      <div className="es-stack">
        {listed.error !== null && <Alert variant="danger" title={listed.error} />}
        {session.who.role === "admin" && <Migrations revision={revision} />}
        {exports?.length === 0 && (
          <EmptyState titleText="Nothing is exported" headingLevel="h2">
            <EmptyStateBody>Open a volume and export it: you get the commands to attach it.</EmptyStateBody>
          </EmptyState>
        )}
        <ul className="es-items es-lined">
          {exports?.map((one) => (
            <li key={`${one.vid} ${one.client_uid}`} className="es-item">
              <div>
                <a href={href("volumes", one.vid)}>{byId.get(one.vid)?.name ?? shortUid(one.vid)}</a>{" "}
                <ExportState one={one} />
                <div className="es-muted es-small">
                  {one.protocol ?? "unknown"} to <code title={one.client_uid ?? ""}>{shortUid(one.client_uid ?? "?")}</code>
                  {one.readonly === true && " · read-only"} · since {time(one.created)}
                </div>
                {one.reason !== null && <div className="es-small">{one.reason}</div>}
              </div>
              <dl className="es-traffic">
                <Figure label="Connected" value={number(one.sessions)} />
                <Figure label="Read" value={bytes(one.read_bytes)} />
                <Figure label="Written" value={bytes(one.written_bytes)} />
              </dl>
            </li>
          ))}
        </ul>
        {(listed.value?.orphans ?? []).map((one) => (
          <Alert key={one.name} variant="warning" title={`${one.name} was served although nobody asked; it is being withdrawn`} />
        ))}
      </div>
    </View>
  );
}

function Figure({ label, value }: { label: string; value: string }): ReactNode {
  return (
    <div>
      <dt>{label}</dt>
      <dd>{value}</dd>
    </div>
  );
}

function Migrations({ revision }: { revision: number }): ReactNode {
  const { byId } = useStore(volumes);
  const found = useResource(() => call("livemigration", {}), `migrations ${revision}`);
  if (!found.value?.length) return null;
  return (
    <section aria-labelledby="migrations">
      <Content component="h2" id="migrations">
        Guests that are moving
      </Content>
      <ul className="es-items">
        {found.value.map((one) => (
          <li key={one.migration}>
            <Alert
              variant={one.overdue ? "warning" : "info"}
              title={`From ${shortUid(one.source)} to ${shortUid(one.destination)}: ${one.state}${one.overdue ? ", overdue" : ""}`}
            >
              {one.volumes.map((vid) => (
                <a key={vid} href={href("volumes", vid)}>
                  {byId.get(vid)?.name ?? vid}{" "}
                </a>
              ))}
              Conclude or revert it there.
            </Alert>
          </li>
        ))}
      </ul>
    </section>
  );
}
