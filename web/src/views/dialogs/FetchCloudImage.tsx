import { type ReactNode, useState } from "react";
import { begin } from "../../api/client";
import { announceJob } from "../../state/jobs";
import { clientOf, defaultOwner, normaliseUid, rememberOwner, type Session } from "../../state/session";
import { Dialog } from "../../ui/Dialog";
import { CheckField, OwnerField, SizeField, TextField } from "../../ui/fields";
import { go } from "../../ui/route";

export function FetchCloudImage({ session, onClose }: { session: Session; onClose: () => void }): ReactNode {
  const [name, setName] = useState("");
  const [url, setUrl] = useState("");
  const [checksum, setChecksum] = useState("");
  const [size, setSize] = useState("20");
  const [owner, setOwner] = useState(defaultOwner(session));
  const [isPrivate, setPrivate] = useState(true);
  const creatorID = normaliseUid(owner);
  const submit = async (): Promise<void> => {
    if (creatorID === null) return;
    rememberOwner(session, creatorID);
    const job = await begin("cloudinit/create", {
      creatorID,
      name: name.trim(),
      url,
      format: "qcow2",
      private: isPrivate,
      ...(Number(size) > 0 ? { size: Number(size) } : {}),
      ...(checksum.trim() === "" ? {} : { checksum: checksum.trim() }),
    });
    if (typeof job === "string") announceJob(job, `Fetch ${name}`);
    go("jobs");
  };
  return (
    <Dialog
      title="Fetch a cloud image"
      submit="Fetch"
      isReady={name.trim() !== "" && creatorID !== null && /^https?:\/\/./.test(url)}
      onSubmit={submit}
      onClose={onClose}
    >
      <TextField id="image-name" label="Name" isRequired autoFocus value={name} onChange={setName} />
      <TextField
        id="url"
        label="Address"
        isRequired
        value={url}
        onChange={setUrl}
        placeholder="https://cloud.debian.org/images/cloud/…qcow2"
      />
      <TextField id="checksum" label="Checksum" value={checksum} onChange={setChecksum} placeholder="sha512:…" />
      <SizeField id="size" label="Size" value={size} onChange={setSize} help="The disk is grown to this." />
      <OwnerField id="image-owner" shown={clientOf(session) === undefined} value={owner} onChange={setOwner} />
      <CheckField id="image-private" label="Private" value={isPrivate} onChange={setPrivate} />
    </Dialog>
  );
}
