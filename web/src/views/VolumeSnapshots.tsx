import { Button, Card, CardBody, CardHeader, CardTitle, Content } from "@patternfly/react-core";
import { type ReactNode, useState } from "react";
import { begin, call } from "../api/client";
import type { Snapshot, Volume } from "../api/types";
import { announceJob } from "../state/jobs";
import { useResource } from "../state/resource";
import { changerOf, clientOf, mayChange } from "../state/session";
import { failed, toast } from "../state/toasts";
import { volumeChanged } from "../state/volumes";
import { Dialog } from "../ui/Dialog";
import { CheckField, TextField } from "../ui/fields";
import { bytes, time } from "../ui/format";
import { useSession } from "../ui/session-context";
import { Alert } from "../ui/Note";

/** What the volume held at other times. */
export function VolumeSnapshots({ volume }: { volume: Volume }): ReactNode {
  const session = useSession();
  const client = clientOf(session);
  const owned = mayChange(session, volume);
  const [taking, setTaking] = useState(false);
  const [restoring, setRestoring] = useState<Snapshot | null>(null);
  const count = volume.snapshots ?? 0;
  const listed = useResource(
    () => call("snapshots", { vid: volume.volumeID, ...(client === undefined ? {} : { client_uid: client }) }),
    `${volume.volumeID} ${count} ${volume.lastUpdated}`,
  );
  const remove = async (snapshot: Snapshot): Promise<void> => {
    try {
      await call("snapshots/delete", {
        vid: volume.volumeID,
        creatorID: changerOf(session, volume),
        snapshot: snapshot.snapshot,
      });
      toast("success", `${snapshot.name || "The snapshot"} was deleted`);
    } catch (error) {
      failed("The snapshot is still there", error);
    }
    volumeChanged(volume.volumeID);
    listed.reload();
  };
  return (
    <Card isCompact>
      <CardHeader
        actions={{
          actions: owned && (
            <Button variant="secondary" size="sm" onClick={() => setTaking(true)}>
              Take snapshot
            </Button>
          ),
          hasNoOffset: true,
        }}
      >
        <CardTitle component="h2">Snapshots</CardTitle>
      </CardHeader>
      <CardBody>
        {listed.error !== null && <Alert variant="danger" title={listed.error} />}
        {listed.value?.length === 0 && (
          <Content component="p" className="es-muted">
            None.
          </Content>
        )}
        <ul className="es-items">
          {listed.value?.map((one) => (
            <li key={one.snapshot} className="es-item">
              <div>
                <strong>{one.name || "(no name)"}</strong>
                <div className="es-muted es-small">
                  {time(one.created)} · {bytes(one.size)}
                  {one.description && ` · ${one.description}`}
                </div>
              </div>
              {owned && (
                <div className="es-actions">
                  <Button variant="secondary" size="sm" onClick={() => setRestoring(one)} aria-label={`Restore ${one.name}`}>
                    Restore…
                  </Button>
                  <Button variant="secondary" isDanger size="sm" onClick={() => void remove(one)} aria-label={`Delete ${one.name}`}>
                    Delete
                  </Button>
                </div>
              )}
            </li>
          ))}
        </ul>
      </CardBody>
      {taking && <TakeSnapshot volume={volume} onClose={() => setTaking(false)} onTaken={listed.reload} />}
      {restoring !== null && (
        <RestoreSnapshot volume={volume} snapshot={restoring} onClose={() => setRestoring(null)} onBegun={listed.reload} />
      )}
    </Card>
  );
}

function TakeSnapshot(props: { volume: Volume; onClose: () => void; onTaken: () => void }): ReactNode {
  const { volume } = props;
  const session = useSession();
  const [name, setName] = useState("");
  const [description, setDescription] = useState("");
  const submit = async (): Promise<void> => {
    await call("snapshots/create", {
      vid: volume.volumeID,
      creatorID: changerOf(session, volume),
      name: name.trim(),
      description: description.trim(),
    });
    volumeChanged(volume.volumeID);
    props.onTaken();
  };
  return (
    <Dialog
      title={`Take a snapshot of ${volume.name}`}
      description="What it holds now is kept, also while a guest writes to it."
      submit="Take snapshot"
      isReady={name.trim() !== ""}
      onSubmit={submit}
      onClose={props.onClose}
    >
      <TextField id="name" label="Name" isRequired autoFocus value={name} onChange={setName} />
      <TextField id="description" label="Description" value={description} onChange={setDescription} />
    </Dialog>
  );
}

function RestoreSnapshot(props: {
  volume: Volume;
  snapshot: Snapshot;
  onClose: () => void;
  onBegun: () => void;
}): ReactNode {
  const { volume, snapshot } = props;
  const session = useSession();
  const [keep, setKeep] = useState(true);
  const submit = async (): Promise<void> => {
    const job = await begin("snapshots/restore", {
      vid: volume.volumeID,
      creatorID: changerOf(session, volume),
      snapshot: snapshot.snapshot,
      keep,
    });
    if (typeof job === "string") announceJob(job, `Restore ${volume.name}`);
    props.onBegun();
  };
  return (
    <Dialog
      title={`Restore ${snapshot.name || "the snapshot"}?`}
      description={`${volume.name} will hold again what it did on ${time(snapshot.created)}.`}
      submit="Restore"
      isDanger
      onSubmit={submit}
      onClose={props.onClose}
    >
      <CheckField
        id="keep"
        label="Keep what it holds now as a snapshot"
        help={keep ? "It costs nothing." : "What it holds now will be lost."}
        value={keep}
        onChange={setKeep}
      />
    </Dialog>
  );
}
