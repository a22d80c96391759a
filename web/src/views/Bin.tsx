import { Button, EmptyState, EmptyStateBody } from "@patternfly/react-core";
import type { ReactNode } from "react";
import { call } from "../api/client";
import { useResource } from "../state/resource";
import { clientOf } from "../state/session";
import { useStore } from "../state/store";
import { volumes } from "../state/volumes";
import { ago, bytes } from "../ui/format";
import { useSession } from "../ui/session-context";
import { View } from "../ui/View";
import { restoreVolume } from "./dialogs/ChangeVolume";
import { Alert } from "../ui/Note";

export default function Bin(): ReactNode {
  const client = clientOf(useSession());
  const { byId } = useStore(volumes);
  const bin = useResource(() => call("bin", client === undefined ? {} : { client_uid: client }), `bin ${byId.size}`);
  const found = bin.value?.toReversed();
  return (
    <View title="Bin" intro="What was destroyed stays here for a while. It may go earlier when a new volume needs its room.">
      {bin.error !== null && <Alert variant="danger" title={bin.error} />}
      {found?.length === 0 && (
        <EmptyState titleText="The bin is empty" headingLevel="h2">
          <EmptyStateBody>Nothing was destroyed of late.</EmptyStateBody>
        </EmptyState>
      )}
      <ul className="es-items es-lined">
        {found?.map((one) => (
          <li key={one.volumeID} className="es-item">
            <div>
              <strong>{one.name || "(no name)"}</strong>
              <div className="es-muted es-small">
                {one.format} · {bytes(one.size)} · {one.location} · destroyed {ago(one.destroyed)}, goes {ago(one.purgeAt)}
              </div>
            </div>
            <Button
              variant="secondary"
              size="sm"
              aria-label={`Restore ${one.name}`}
              onClick={() => void restoreVolume(one.volumeID, one.name, client).then(bin.reload)}
            >
              Restore
            </Button>
          </li>
        ))}
      </ul>
    </View>
  );
}
