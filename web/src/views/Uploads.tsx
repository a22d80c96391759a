import { Button, Card, CardBody, CardTitle, Form, ActionGroup } from "@patternfly/react-core";
import { type ReactNode, useEffect, useRef, useState } from "react";
import type { Volume } from "../api/types";
import { useResource } from "../state/resource";
import { changerOf, clientOf, defaultOwner, normaliseUid, rememberOwner } from "../state/session";
import { useStore } from "../state/store";
import { failed } from "../state/toasts";
import {
  type BrokenOff,
  brokenOff,
  discard,
  forget,
  giveUp,
  goOn,
  hasRoom,
  pause,
  resume,
  send,
  type Sending,
  sendings,
} from "../state/uploads";
import { volumes } from "../state/volumes";
import { Bar } from "../ui/Bar";
import { CheckField, OwnerField, SelectField, TextField } from "../ui/fields";
import { bytes, duration, percent } from "../ui/format";
import { areGood, IsoFields, isoKeys, NO_FACTS } from "../ui/IsoFields";
import { href, useRoute } from "../ui/route";
import { useSession } from "../ui/session-context";
import { View } from "../ui/View";
import { Alert } from "../ui/Note";

export default function Uploads(): ReactNode {
  const session = useSession();
  const [, verb, id] = useRoute();
  const fill = useStore(volumes).byId.get(verb === "fill" && id ? id : "");
  const sending = useStore(sendings);
  const client = clientOf(session);
  const left = useResource(() => brokenOff(client), `uploads ${sending.length}`);
  const busy = sending.some((one) => one.state === "sending");
  useEffect(() => {
    if (!busy) return;
    const warn = (event: BeforeUnloadEvent): void => event.preventDefault();
    window.addEventListener("beforeunload", warn);
    return () => window.removeEventListener("beforeunload", warn);
  }, [busy]);
  return (
    <View
      title="Uploads"
      intro="An upload that is broken off, by a reload too, goes on where it was. Keep this tab open while it sends."
    >
      <div className="es-stack">
        {left.error !== null && <Alert variant="danger" title={left.error} />}
        {(left.value ?? []).map((one) => (
          <Left key={one.uploadId} one={one} onChange={left.reload} />
        ))}
        {sending.map((one) => (
          <Line key={one.id} one={one} />
        ))}
        <NewUpload key={fill?.volumeID ?? ""} fill={fill} />
      </div>
    </View>
  );
}

const KINDS = [
  ["disk", "A disk: raw, qcow2, vmdk, vdi, vhd, vhdx, also compressed"],
  ["iso", "An ISO image"],
] as const;
const FORMATS = [
  ["qcow2", "qcow2"],
  ["raw", "raw"],
] as const;

function NewUpload({ fill }: { fill: Volume | undefined }): ReactNode {
  const session = useSession();
  const [file, setFile] = useState<File | null>(null);
  const [name, setName] = useState("");
  const [kind, setKind] = useState<"disk" | "iso">("disk");
  const [format, setFormat] = useState<"qcow2" | "raw">("qcow2");
  const [facts, setFacts] = useState(NO_FACTS);
  const [owner, setOwner] = useState(defaultOwner(session));
  const [isPrivate, setPrivate] = useState(true);
  const [bootable, setBootable] = useState(true);
  const [problem, setProblem] = useState<string | null>(null);
  const [over, setOver] = useState(false);
  const input = useRef<HTMLInputElement>(null);
  const creatorID = normaliseUid(owner);
  const isReady =
    file !== null && (fill !== undefined || (name.trim() !== "" && creatorID !== null && (kind === "disk" || areGood(facts))));

  const choose = (chosen: File | undefined): void => {
    if (chosen === undefined) return;
    setFile(chosen);
    setName((before) => before || chosen.name.replace(/(\.(img|raw|qcow2|iso|vmdk|vdi|vhdx?|gz|xz|zst))+$/i, ""));
    if (/\.iso$/i.test(chosen.name)) setKind("iso");
  };
  const submit = async (): Promise<void> => {
    if (file === null || creatorID === null) return;
    setProblem(null);
    try {
      if (fill !== undefined) {
        await send(file, { volume_id: fill.volumeID, creatorID: changerOf(session, fill), name: fill.name });
      } else {
        if (!(await hasRoom(file.size))) throw new Error("No location has room for a file of this size.");
        rememberOwner(session, creatorID);
        const common = { creatorID, name: name.trim(), private: String(isPrivate) };
        await send(file, kind === "iso" ? { ...common, ...isoKeys(facts) } : { ...common, format, bootable: String(bootable) });
      }
      setFile(null);
      setName("");
      if (input.current !== null) input.current.value = "";
      document.getElementById("main")?.scrollTo({ top: 0 });
    } catch (error) {
      setProblem(error instanceof Error ? error.message : String(error));
    }
  };
  return (
    <Card className="es-form">
      <CardTitle component="h2">{fill === undefined ? "Upload an image" : `Upload the content of ${fill.name}`}</CardTitle>
      <CardBody>
        <Form
          onSubmit={(event) => {
            event.preventDefault();
            void submit();
          }}
        >
          {problem !== null && <Alert variant="danger" title={problem} aria-live="assertive" />}
          <div
            className={over ? "es-drop es-drop-over" : "es-drop"}
            onDragOver={(event) => {
              event.preventDefault();
              setOver(true);
            }}
            onDragLeave={() => setOver(false)}
            onDrop={(event) => {
              event.preventDefault();
              setOver(false);
              choose(event.dataTransfer.files[0]);
            }}
          >
            <label htmlFor="file">File</label>
            <input id="file" ref={input} type="file" onChange={(event) => choose(event.target.files?.[0])} />
            <span className="es-muted es-small">{file === null ? "or drop one here" : `${file.name}, ${bytes(file.size)}`}</span>
          </div>
          {fill === undefined && (
            <>
              <TextField id="name" label="Name of the volume" isRequired value={name} onChange={setName} />
              <SelectField id="kind" label="It is" value={kind} onChange={setKind} options={KINDS} />
              {kind === "iso" && <IsoFields facts={facts} onChange={setFacts} />}
              {kind === "disk" && (
                <SelectField
                  id="format"
                  label="Keep it as"
                  value={format}
                  onChange={setFormat}
                  options={FORMATS}
                  help="What it arrives as is found from its bytes, and checked."
                />
              )}
              <OwnerField id="owner" shown={clientOf(session) === undefined} value={owner} onChange={setOwner} />
              <CheckField id="private" label="Private" help="Nobody but its owner sees it." value={isPrivate} onChange={setPrivate} />
              {kind === "disk" && <CheckField id="bootable" label="Bootable" value={bootable} onChange={setBootable} />}
            </>
          )}
          <ActionGroup>
            <Button type="submit" isDisabled={!isReady}>
              Upload
            </Button>
          </ActionGroup>
        </Form>
      </CardBody>
    </Card>
  );
}

function Line({ one }: { one: Sending }): ReactNode {
  const left = one.rate > 0 ? duration((one.size - one.sent) / one.rate) : "";
  const told = {
    sending: [percent(one.size > 0 ? one.sent / one.size : 0), one.rate > 0 && `${bytes(one.rate)}/s`, left && `${left} left`],
    paused: ["Paused at", bytes(one.sent)],
    finishing: ["All has arrived; the volume is being made"],
    done: ["Done"],
    failed: ["Failed"],
  }[one.state];
  return (
    <Card isCompact data-upload={one.state}>
      <CardBody>
        <div className="es-stack es-stack-tight">
          <Bar
            title={one.volumeId === null ? one.name : <a href={href("volumes", one.volumeId)}>{one.name}</a>}
            label={`Upload of ${one.name}`}
            told={told.filter(Boolean).join(" · ")}
            fraction={one.size > 0 ? one.sent / one.size : 1}
            variant={one.state === "failed" ? "danger" : one.state === "done" ? "success" : undefined}
          />
          {one.error !== null && <Alert variant="danger" isPlain title={one.error} />}
          <div className="es-actions">
            {one.state === "sending" && (
              <Button size="sm" variant="secondary" onClick={() => void pause(one.id)}>
                Pause
              </Button>
            )}
            {one.state === "paused" && (
              <Button size="sm" variant="secondary" onClick={() => resume(one.id)}>
                Go on
              </Button>
            )}
            {(one.state === "sending" || one.state === "paused") && (
              <Button size="sm" variant="secondary" isDanger onClick={() => void giveUp(one.id)}>
                Give up
              </Button>
            )}
            {(one.state === "done" || one.state === "failed") && (
              <Button size="sm" variant="link" isInline onClick={() => forget(one.id)} aria-label={`Clear ${one.name}`}>
                Clear
              </Button>
            )}
          </div>
        </div>
      </CardBody>
    </Card>
  );
}

/** A page cannot open a file by itself again, so whoever has it chooses it once more. */
function Left({ one, onChange }: { one: BrokenOff; onChange: () => void }): ReactNode {
  const [problem, setProblem] = useState<string | null>(null);
  const again = async (file: File | undefined): Promise<void> => {
    if (file === undefined) return;
    try {
      await goOn(file, one);
      onChange();
    } catch (error) {
      setProblem(error instanceof Error ? error.message : String(error));
    }
  };
  const end = async (): Promise<void> => {
    try {
      await discard(one);
    } catch (error) {
      failed("It was not discarded", error);
    }
    onChange();
  };
  const id = `again-${one.uploadId}`;
  return (
    <Alert
      variant="warning"
      title={`${one.name} was broken off at ${bytes(one.offset)} of ${bytes(one.size)}`}
      actionLinks={
        <Button variant="link" isInline onClick={() => void end()} aria-label={`Discard ${one.name}`}>
          Discard
        </Button>
      }
    >
      <div className="es-drop">
        <label htmlFor={id}>Choose {one.fileName || "the file"} again to go on</label>
        <input id={id} type="file" onChange={(event) => void again(event.target.files?.[0])} />
      </div>
      {problem !== null && <div role="alert">{problem}</div>}
    </Alert>
  );
}
