import { ExpandableSection } from "@patternfly/react-core";
import { type ReactNode, useState } from "react";
import { begin, call } from "../../api/client";
import { announceJob } from "../../state/jobs";
import { clientOf, defaultOwner, normaliseUid, rememberOwner, type Session } from "../../state/session";
import { toast } from "../../state/toasts";
import { volumeChanged } from "../../state/volumes";
import { Dialog } from "../../ui/Dialog";
import { CheckField, OwnerField, SelectField, SizeField, TextField } from "../../ui/fields";
import { go } from "../../ui/route";

const SOURCES = [
  ["empty", "Nothing: an empty disk"],
  ["url", "An image on the web"],
] as const;
const FORMATS = [
  ["qcow2", "qcow2: takes room as it is written"],
  ["raw", "raw: the fastest"],
] as const;
const BUSES = [
  ["virtio", "virtio"],
  ["scsi", "scsi"],
  ["sata", "sata"],
  ["ide", "ide"],
] as const;

export function CreateVolume({ session, onClose }: { session: Session; onClose: () => void }): ReactNode {
  const [name, setName] = useState("");
  const [source, setSource] = useState<"empty" | "url">("empty");
  const [url, setUrl] = useState("");
  const [checksum, setChecksum] = useState("");
  const [size, setSize] = useState("10");
  const [format, setFormat] = useState<"qcow2" | "raw">("qcow2");
  const [bus, setBus] = useState<"virtio" | "scsi" | "sata" | "ide">("virtio");
  const [owner, setOwner] = useState(defaultOwner(session));
  const [isPrivate, setPrivate] = useState(true);
  const [bootable, setBootable] = useState(false);
  const [shareable, setShareable] = useState(false);
  const [more, setMore] = useState(false);
  const fromWeb = source === "url";
  const creatorID = normaliseUid(owner);
  const isReady =
    name.trim() !== "" && creatorID !== null && (fromWeb ? /^https?:\/\/./.test(url) : Number(size) > 0);

  const submit = async (): Promise<void> => {
    if (creatorID === null) return;
    rememberOwner(session, creatorID);
    const common = { creatorID, name: name.trim(), format, bus, private: isPrivate, bootable, shareable };
    if (fromWeb) {
      const body = {
        ...common,
        url,
        ...(checksum.trim() === "" ? {} : { checksum: checksum.trim() }),
        ...(Number(size) > 0 ? { size: Number(size) } : {}),
      };
      const job = await begin("create/url", body);
      if (typeof job === "string") announceJob(job, `Fetch ${name}`);
      go("jobs");
      return;
    }
    const made = await call("create", { ...common, size: Number(size) });
    volumeChanged(made.vid);
    toast("success", `${name} is there`, undefined, { label: "Show it", run: () => go("volumes", made.vid) });
  };

  return (
    <Dialog title="Create volume" submit={fromWeb ? "Fetch" : "Create"} isReady={isReady} onSubmit={submit} onClose={onClose}>
      <TextField id="name" label="Name" isRequired autoFocus value={name} onChange={setName} />
      <SelectField id="source" label="What is in it" value={source} onChange={setSource} options={SOURCES} />
      {fromWeb && (
        <>
          <TextField
            id="url"
            label="Address of the image"
            isRequired
            value={url}
            onChange={setUrl}
            placeholder="https://…"
            help="raw, qcow2, vmdk, vdi, vhd or vhdx; also compressed. The server fetches it."
          />
          <TextField
            id="checksum"
            label="Checksum"
            value={checksum}
            onChange={setChecksum}
            placeholder="sha256:…"
            help="The volume appears only if this is right."
          />
        </>
      )}
      <SizeField
        id="size"
        label="Size"
        isRequired={!fromWeb}
        value={size}
        onChange={setSize}
        {...(fromWeb ? { help: "A smaller image is grown to this. Empty: as large as it is." } : {})}
      />
      <OwnerField id="owner" shown={clientOf(session) === undefined} value={owner} onChange={setOwner} />
      <CheckField
        id="private"
        label="Private"
        help="Nobody but its owner sees it."
        value={isPrivate}
        onChange={setPrivate}
      />
      <ExpandableSection toggleText="More" isExpanded={more} onToggle={(_event, open) => setMore(open)}>
        <div className="es-stack">
          <SelectField id="format" label="Format" value={format} onChange={setFormat} options={FORMATS} />
          <SelectField id="bus" label="Bus" value={bus} onChange={setBus} options={BUSES} />
          <CheckField
            id="bootable"
            label="Bootable"
            value={bootable}
            isDisabled={shareable}
            onChange={setBootable}
          />
          <CheckField
            id="shareable"
            label="Shareable"
            help="Several clients may use it at once. Not together with bootable."
            value={shareable}
            isDisabled={bootable}
            onChange={setShareable}
          />
        </div>
      </ExpandableSection>
    </Dialog>
  );
}
