import { type ReactNode, useState } from "react";
import { begin, call } from "../../api/client";
import { announceJob } from "../../state/jobs";
import { clientOf, defaultOwner, normaliseUid, rememberOwner, type Session } from "../../state/session";
import { volumeChanged } from "../../state/volumes";
import { Dialog } from "../../ui/Dialog";
import { CheckField, OwnerField, SelectField, TextField } from "../../ui/fields";
import { areGood, IsoFields, isoKeys, NO_FACTS } from "../../ui/IsoFields";
import { go } from "../../ui/route";

const SOURCES = [
  ["url", "The web: the server fetches it"],
  ["upload", "This computer: upload it next"],
] as const;

export function AddIso({ session, onClose }: { session: Session; onClose: () => void }): ReactNode {
  const [name, setName] = useState("");
  const [source, setSource] = useState<"url" | "upload">("url");
  const [url, setUrl] = useState("");
  const [checksum, setChecksum] = useState("");
  const [facts, setFacts] = useState(NO_FACTS);
  const [owner, setOwner] = useState(defaultOwner(session));
  const [isPrivate, setPrivate] = useState(false);
  const creatorID = normaliseUid(owner);
  const fromWeb = source === "url";
  const isReady =
    name.trim() !== "" && creatorID !== null && areGood(facts) && (!fromWeb || /^https?:\/\/./.test(url));
  const submit = async (): Promise<void> => {
    if (creatorID === null) return;
    rememberOwner(session, creatorID);
    const common = { creatorID, name: name.trim(), private: isPrivate, ...isoKeys(facts) };
    if (fromWeb) {
      const job = await begin("iso/create/url", {
        ...common,
        url,
        ...(checksum.trim() === "" ? {} : { checksum: checksum.trim() }),
      });
      if (typeof job === "string") announceJob(job, `Fetch ${name}`);
      go("jobs");
    } else {
      const made = await call("iso/create", common);
      volumeChanged(made.vid);
      go("uploads", "fill", made.vid);
    }
  };
  return (
    <Dialog title="Add an ISO image" submit={fromWeb ? "Fetch" : "Next"} isReady={isReady} onSubmit={submit} onClose={onClose}>
      <TextField id="name" label="Name" isRequired autoFocus value={name} onChange={setName} />
      <SelectField id="source" label="From" value={source} onChange={setSource} options={SOURCES} />
      {fromWeb && (
        <>
          <TextField id="url" label="Address" isRequired value={url} onChange={setUrl} placeholder="https://…" />
          <TextField id="checksum" label="Checksum" value={checksum} onChange={setChecksum} placeholder="sha256:…" />
        </>
      )}
      <IsoFields facts={facts} onChange={setFacts} />
      <OwnerField id="owner" shown={clientOf(session) === undefined} value={owner} onChange={setOwner} />
      <CheckField id="private" label="Private" help="Nobody but its owner sees it." value={isPrivate} onChange={setPrivate} />
    </Dialog>
  );
}
