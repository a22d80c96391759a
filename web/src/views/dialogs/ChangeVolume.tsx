import { type ReactNode, useState } from "react";
import { begin, call } from "../../api/client";
import type { Volume } from "../../api/types";
import { announceJob } from "../../state/jobs";
import { changerOf, clientOf, defaultOwner, normaliseUid, rememberOwner, type Session } from "../../state/session";
import { failed, toast } from "../../state/toasts";
import { volumeChanged, volumeRemoved } from "../../state/volumes";
import { Dialog } from "../../ui/Dialog";
import { CheckField, OwnerField, SelectField, SizeField, TextField } from "../../ui/fields";
import { go } from "../../ui/route";
import { Alert } from "../../ui/Note";

interface DialogProps {
  volume: Volume;
  session: Session;
  onClose: () => void;
}

const BUSES = [
  ["virtio", "virtio"],
  ["scsi", "scsi"],
  ["sata", "sata"],
  ["ide", "ide"],
] as const;

export function EditVolume({ volume, session, onClose }: DialogProps): ReactNode {
  const [name, setName] = useState(volume.name);
  const [isPrivate, setPrivate] = useState(volume.private);
  const [readonly, setReadonly] = useState(volume.readonly);
  const [shareable, setShareable] = useState(volume.shareable);
  const [bootable, setBootable] = useState(volume.bootable);
  const [clonable, setClonable] = useState(volume.clonable);
  const [bus, setBus] = useState(volume.bus);
  const submit = async (): Promise<void> => {
    await call("update", {
      vid: volume.volumeID,
      creatorID: changerOf(session, volume),
      name: name.trim(),
      private: isPrivate,
      shareable,
      bootable,
      bus,
      ...(readonly === volume.readonly ? {} : { readonly }),
      ...(clonable === volume.clonable ? {} : { clonable }),
    });
    volumeChanged(volume.volumeID);
  };
  return (
    <Dialog title={`Edit ${volume.name}`} submit="Save" isReady={name.trim() !== ""} onSubmit={submit} onClose={onClose}>
      <TextField id="name" label="Name" isRequired autoFocus value={name} onChange={setName} />
      <SelectField id="bus" label="Bus" value={bus} onChange={setBus} options={BUSES} />
      <CheckField id="private" label="Private" help="Nobody but its owner sees it." value={isPrivate} onChange={setPrivate} />
      <CheckField id="readonly" label="Read-only" value={readonly} onChange={setReadonly} />
      <CheckField id="bootable" label="Bootable" value={bootable} isDisabled={shareable} onChange={setBootable} />
      <CheckField
        id="shareable"
        label="Shareable"
        help="Several clients may use it at once. Not together with bootable."
        value={shareable}
        isDisabled={bootable}
        onChange={setShareable}
      />
      <CheckField id="clonable" label="May be cloned" value={clonable} onChange={setClonable} />
    </Dialog>
  );
}

export function ResizeVolume({ volume, session, onClose }: DialogProps): ReactNode {
  const now = volume.size / 1e9;
  const [size, setSize] = useState(String(Math.round(now * 1000) / 1000));
  const submit = async (): Promise<void> => {
    await call("update/resize", {
      vid: volume.volumeID,
      creatorID: changerOf(session, volume),
      size: Number(size),
    });
    volumeChanged(volume.volumeID);
    toast("success", `${volume.name} is ${size} GB now`);
  };
  return (
    <Dialog
      title={`Resize ${volume.name}`}
      description={`It has ${now} GB, and can only grow. A guest that runs sees the new size when its hypervisor is told.`}
      submit="Resize"
      isReady={Number(size) > now}
      onSubmit={submit}
      onClose={onClose}
    >
      <SizeField id="size" label="New size" isRequired value={size} onChange={setSize} />
    </Dialog>
  );
}

export function ConvertVolume({ volume, session, onClose }: DialogProps): ReactNode {
  const into = volume.format === "raw" ? "qcow2" : "raw";
  const submit = async (): Promise<void> => {
    const job = await begin("update/convert", {
      vid: volume.volumeID,
      creatorID: changerOf(session, volume),
      format: into,
    });
    if (typeof job === "string") announceJob(job, `Convert ${volume.name}`);
  };
  return (
    <Dialog
      title={`Convert ${volume.name} to ${into}`}
      description="The data stays as it is. The old image goes when the new one is complete, so there has to be room for both for a moment."
      submit={`Convert to ${into}`}
      onSubmit={submit}
      onClose={onClose}
    />
  );
}

export function CloneVolume({ volume, session, onClose }: DialogProps): ReactNode {
  const [name, setName] = useState(`${volume.name} copy`);
  const [linked, setLinked] = useState(false);
  const [isPrivate, setPrivate] = useState(volume.private);
  const [owner, setOwner] = useState(clientOf(session) === undefined ? volume.creatorID : defaultOwner(session));
  const creatorID = normaliseUid(owner);
  const submit = async (): Promise<void> => {
    if (creatorID === null) return;
    rememberOwner(session, creatorID);
    const job = await begin("clone", {
      volume_id: volume.volumeID,
      creatorID,
      name: name.trim(),
      private: isPrivate,
      ...(linked ? { linked, format: "qcow2" as const } : {}),
    });
    if (typeof job === "string") announceJob(job, `Clone ${volume.name}`);
  };
  return (
    <Dialog
      title={`Clone ${volume.name}`}
      submit="Clone"
      isReady={name.trim() !== "" && creatorID !== null}
      onSubmit={submit}
      onClose={onClose}
    >
      <TextField id="name" label="Name of the clone" isRequired autoFocus value={name} onChange={setName} />
      <OwnerField id="owner" shown={clientOf(session) === undefined} value={owner} onChange={setOwner} />
      <CheckField id="private" label="Private" value={isPrivate} onChange={setPrivate} />
      {volume.format !== "iso" && (
        <CheckField
          id="linked"
          label="Linked"
          help="There at once, and takes room only for what differs. While it exists the original cannot be changed."
          value={linked}
          onChange={setLinked}
        />
      )}
    </Dialog>
  );
}

export function TransferVolume({ volume, session, onClose }: DialogProps): ReactNode {
  const [owner, setOwner] = useState("");
  const uid = normaliseUid(owner);
  const submit = async (): Promise<void> => {
    if (uid === null) return;
    await call("transfer", { vid: volume.volumeID, creatorID: changerOf(session, volume), newCreatorID: uid });
    if (volume.private && clientOf(session) !== undefined) {
      volumeRemoved(volume.volumeID);
      go("volumes");
    } else volumeChanged(volume.volumeID);
  };
  return (
    <Dialog
      title={`Give ${volume.name} to somebody else`}
      description="It belongs to that client from then on; you cannot take it back."
      submit="Give away"
      isDanger
      isReady={uid !== null}
      onSubmit={submit}
      onClose={onClose}
    >
      <TextField
        id="owner"
        label="New owner"
        isRequired
        autoFocus
        value={owner}
        onChange={setOwner}
        help="32 hex digits, or a UUID with dashes"
      />
    </Dialog>
  );
}

export function ResetVolume({ volume, session, onClose }: DialogProps): ReactNode {
  const submit = async (): Promise<void> => {
    const job = await begin("reset", { vid: volume.volumeID, creatorID: changerOf(session, volume) });
    if (typeof job === "string") announceJob(job, `Reset ${volume.name}`);
  };
  return (
    <Dialog title={`Reset ${volume.name}?`} submit="Reset" isDanger onSubmit={submit} onClose={onClose}>
      <Alert
        variant="warning"
        title={
          volume.linked === true
            ? "It will hold again what the volume it stands on does."
            : "It will be empty, of the same size and format."
        }
      >
        What it holds now cannot be restored.
      </Alert>
    </Dialog>
  );
}

export function CompactVolume({ volume, session, onClose }: DialogProps): ReactNode {
  const submit = async (): Promise<void> => {
    const job = await begin("overlay/compact", { vid: volume.volumeID, creatorID: changerOf(session, volume) });
    if (typeof job === "string") announceJob(job, `Make ${volume.name} independent`);
  };
  return (
    <Dialog
      title={`Make ${volume.name} independent`}
      description="What it has from the volumes it stands on is copied into it."
      submit="Copy"
      onSubmit={submit}
      onClose={onClose}
    />
  );
}

/** Destroying asks nothing: the bin keeps it, and the notice has a way back. */
export async function destroyVolume(volume: Volume, session: Session): Promise<boolean> {
  const name = volume.name || "The volume";
  try {
    await call("destroy", { volume_id: volume.volumeID, creatorID: changerOf(session, volume) });
  } catch (error) {
    failed(`${name} was not destroyed`, error);
    return false;
  }
  volumeRemoved(volume.volumeID);
  toast("info", `${name} is in the bin`, undefined, {
    label: "Undo",
    run: () => void restoreVolume(volume.volumeID, name, clientOf(session)),
  });
  return true;
}

export async function restoreVolume(id: string, name: string, client: string | undefined): Promise<void> {
  try {
    await call("restore", { volume_id: id, ...(client === undefined ? {} : { client_uid: client }) });
    volumeChanged(id);
    toast("success", `${name} is back`, undefined, { label: "Show it", run: () => go("volumes", id) });
  } catch (error) {
    failed(`${name} cannot be brought back`, error);
  }
}
