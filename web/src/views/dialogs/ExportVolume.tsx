import { Button, Modal, ModalBody, ModalFooter, ModalHeader } from "@patternfly/react-core";
import { type ReactNode, useState } from "react";
import { call } from "../../api/client";
import type { Export, Volume } from "../../api/types";
import { exportsRevision } from "../../state/live";
import { clientOf, normaliseUid, type Session } from "../../state/session";
import { volumeChanged } from "../../state/volumes";
import { Dialog } from "../../ui/Dialog";
import { CheckField, SelectField, TextField } from "../../ui/fields";
import { Attach } from "../Attach";

const PROTOCOLS = [
  ["nbd", "NBD: the fastest for QEMU on another host"],
  ["iscsi", "iSCSI: for every operating system, with a password"],
  ["smb", "SMB: a file on a share, encrypted"],
  ["local", "A socket on the server’s own machine"],
] as const;

/** Export a volume, then show how to attach it. */
export function ExportVolume(props: { volume: Volume; session: Session; onClose: () => void }): ReactNode {
  const { volume, session, onClose } = props;
  const [protocol, setProtocol] = useState<"nbd" | "iscsi" | "smb" | "local">("nbd");
  const [client, setClient] = useState(clientOf(session) ?? volume.creatorID);
  const [readonly, setReadonly] = useState(false);
  const [made, setMade] = useState<Export | null>(null);
  const alwaysReadonly = volume.readonly || volume.format === "iso";
  const uid = normaliseUid(client);
  if (made !== null) return <ShowAttach made={made} name={volume.name} onClose={onClose} />;
  const submit = async (): Promise<"stay"> => {
    if (uid === null) return "stay";
    const answer = await call("export", {
      volume_id: volume.volumeID,
      client_uid: uid,
      protocol,
      ...(readonly && !alwaysReadonly ? { readonly } : {}),
    });
    volumeChanged(volume.volumeID);
    exportsRevision.update((count) => count + 1);
    setMade(answer);
    return "stay";
  };
  return (
    <Dialog
      title={`Export ${volume.name}`}
      description="It serves when this is done; you then get what to paste on the client’s host."
      submit="Export"
      isReady={uid !== null}
      onSubmit={submit}
      onClose={onClose}
    >
      <SelectField id="protocol" label="Over" value={protocol} onChange={setProtocol} options={PROTOCOLS} />
      {clientOf(session) === undefined && (
        <TextField
          id="client"
          label="For the client"
          isRequired
          value={client}
          onChange={setClient}
          help={volume.private ? "It is private: nobody but its owner may have it." : "Whose host will use it."}
          error={uid === null ? "32 hex digits, or a UUID with dashes" : undefined}
        />
      )}
      <CheckField
        id="readonly"
        label="Read-only"
        value={readonly || alwaysReadonly}
        isDisabled={alwaysReadonly}
        onChange={setReadonly}
      />
    </Dialog>
  );
}

export function ShowAttach(props: { made: Export; name: string; onClose: () => void }): ReactNode {
  return (
    <Modal isOpen variant="medium" onClose={props.onClose} aria-labelledby="attach-title">
      <ModalHeader title={`Attach ${props.name}`} labelId="attach-title" />
      <ModalBody tabIndex={0} aria-label="How to attach it">
        <Attach made={props.made} />
      </ModalBody>
      <ModalFooter>
        <Button onClick={props.onClose}>Close</Button>
      </ModalFooter>
    </Modal>
  );
}
