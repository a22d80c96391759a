import { type ReactNode, useState } from "react";
import { call } from "../../api/client";
import type { Export, Volume } from "../../api/types";
import { normaliseUid } from "../../state/session";
import { Dialog } from "../../ui/Dialog";
import { TextField } from "../../ui/fields";
import { ShowAttach } from "./ExportVolume";

/** Give a second host the disk while a guest moves there. */
export function MigrateVolume(props: {
  volume: Volume;
  source: string;
  onClose: () => void;
  onPrepared: () => void;
}): ReactNode {
  const [destination, setDestination] = useState("");
  const [made, setMade] = useState<Export | null>(null);
  const uid = normaliseUid(destination);
  if (made !== null) return <ShowAttach made={made} name={`${props.volume.name} there`} onClose={props.onClose} />;
  const submit = async (): Promise<"stay" | undefined> => {
    if (uid === null) return "stay";
    const answer = await call("livemigration/prepare", {
      volume_id: props.volume.volumeID,
      source: props.source,
      destination: uid,
    });
    props.onPrepared();
    const there = answer.exports?.[0];
    if (there === undefined) return undefined;
    setMade(there);
    return "stay";
  };
  return (
    <Dialog
      title={`Migrate the guest of ${props.volume.name}`}
      description="The other host gets the disk as well. Move the guest with your hypervisor, then conclude here; or revert."
      submit="Prepare"
      isReady={uid !== null && uid !== props.source}
      onSubmit={submit}
      onClose={props.onClose}
    >
      <TextField
        id="destination"
        label="To the client"
        isRequired
        autoFocus
        value={destination}
        onChange={setDestination}
        help="32 hex digits, or a UUID with dashes"
      />
    </Dialog>
  );
}
