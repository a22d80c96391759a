import {
  ActionGroup,
  Button,
  Card,
  CardBody,
  CardTitle,
  Content,
  ExpandableSection,
  Form,
  FormGroup,
  TextArea,
} from "@patternfly/react-core";
import { type ReactNode, useMemo, useState } from "react";
import { address, call, request } from "../api/client";
import type { Metadata, Volume } from "../api/types";
import { clientOf, defaultOwner, normaliseUid, rememberOwner, type Session } from "../state/session";
import { useStore } from "../state/store";
import { failed, toast } from "../state/toasts";
import { checkUserData, checkYaml, type Finding, writeUserData } from "../state/userdata";
import { volumeChanged, volumes } from "../state/volumes";
import { CheckField, OwnerField, TextField } from "../ui/fields";
import { bytes } from "../ui/format";
import { go, href } from "../ui/route";
import { useSession } from "../ui/session-context";
import { View } from "../ui/View";
import { FetchCloudImage } from "./dialogs/FetchCloudImage";
import { Alert } from "../ui/Note";

const START = `#cloud-config
hostname: web-1
users:
  - name: debian
    sudo: ALL=(ALL) NOPASSWD:ALL
    shell: /bin/bash
    ssh_authorized_keys:
      - ssh-ed25519 AAAA… you@example
`;

/** A cloud image, and the seed that tells it what to become. */
export default function CloudInit(): ReactNode {
  const session = useSession();
  const [fetching, setFetching] = useState(false);
  const all = [...useStore(volumes).byId.values()];
  const images = all.filter((volume) => volume.cloudinit && volume.format !== "iso");
  const seeds = all.filter((volume) => volume.cloudinit && volume.format === "iso");
  return (
    <View
      title="Cloud-init"
      intro="A machine from a cloud image needs two disks: the image, and a seed with what it shall become. Export both to it."
      actions={<Button onClick={() => setFetching(true)}>Fetch a cloud image</Button>}
    >
      <div className="es-columns">
        <Seed session={session} />
        <div className="es-stack">
          <Listed title="Cloud images" found={images} none="None yet. Fetch one, or clone one." />
          <Listed title="Seeds" found={seeds} none="None yet." />
        </div>
      </div>
      {fetching && <FetchCloudImage session={session} onClose={() => setFetching(false)} />}
    </View>
  );
}

function Listed({ title, found, none }: { title: string; found: readonly Volume[]; none: string }): ReactNode {
  return (
    <Card isCompact>
      <CardTitle component="h2">{title}</CardTitle>
      <CardBody>
        {found.length === 0 && (
          <Content component="p" className="es-muted">
            {none}
          </Content>
        )}
        <ul className="es-items">
          {found.map((volume) => (
            <li key={volume.volumeID} className="es-item">
              <a href={href("volumes", volume.volumeID)}>{volume.name || "(no name)"}</a>
              <span className="es-muted es-small">{volume.waiting === true ? "files are missing" : bytes(volume.size)}</span>
            </li>
          ))}
        </ul>
      </CardBody>
    </Card>
  );
}

function Seed({ session }: { session: Session }): ReactNode {
  const [name, setName] = useState("");
  const [owner, setOwner] = useState(defaultOwner(session));
  const [isPrivate, setPrivate] = useState(true);
  const [userData, setUserData] = useState(START);
  const [network, setNetwork] = useState("");
  const [writing, setWriting] = useState(false);
  const [more, setMore] = useState(false);
  const [busy, setBusy] = useState(false);
  const findings = useMemo(() => checkUserData(userData), [userData]);
  const networkFindings = useMemo(() => (network.trim() === "" ? [] : checkYaml(network, null)), [network]);
  const hasErrors = [...findings, ...networkFindings].some((one) => one.kind === "error");
  const creatorID = normaliseUid(owner);
  const isReady = name.trim() !== "" && creatorID !== null && !hasErrors && !busy;

  const submit = async (): Promise<void> => {
    if (creatorID === null) return;
    setBusy(true);
    rememberOwner(session, creatorID);
    try {
      const files = [new File([userData], "user-data")];
      if (network.trim() !== "") files.push(new File([network], "network-data"));
      const vid = await makeSeed({ creatorID, name: name.trim(), private: isPrivate }, files);
      toast("success", `${name} is there`, "Export it read-only, together with the image.", {
        label: "Show it",
        run: () => go("volumes", vid),
      });
      setName("");
    } catch (error) {
      failed("The seed was not made", error);
    }
    setBusy(false);
  };
  return (
    <Card>
      <CardTitle component="h2">New seed</CardTitle>
      <CardBody>
        <Form
          onSubmit={(event) => {
            event.preventDefault();
            void submit();
          }}
        >
          <TextField id="name" label="Name" isRequired value={name} onChange={setName} placeholder="web-1-seed" />
          <ExpandableSection
            toggleText="Write user-data for me"
            isExpanded={writing}
            onToggle={(_event, open) => setWriting(open)}
          >
            <Wishes
              onWrite={(text) => {
                setUserData(text);
                setWriting(false);
              }}
            />
          </ExpandableSection>
          <Editor id="user-data" label="user-data" value={userData} onChange={setUserData} findings={findings} rows={14} />
          <ExpandableSection toggleText="Network" isExpanded={more} onToggle={(_event, open) => setMore(open)}>
            <Editor
              id="network-data"
              label="network-data"
              value={network}
              onChange={setNetwork}
              findings={networkFindings}
              rows={6}
            />
            <Content component="small" className="es-muted">
              Empty: DHCP.
            </Content>
          </ExpandableSection>
          <OwnerField id="owner" shown={clientOf(session) === undefined} value={owner} onChange={setOwner} />
          <CheckField id="private" label="Private" help="Nobody but its owner sees it." value={isPrivate} onChange={setPrivate} />
          <ActionGroup>
            <Button type="submit" isDisabled={!isReady} isLoading={busy}>
              Make the seed
            </Button>
          </ActionGroup>
        </Form>
      </CardBody>
    </Card>
  );
}

async function makeSeed(about: { creatorID: string; name: string; private: boolean }, files: readonly File[]): Promise<string> {
  const { vid } = await call("cloudinit/metadata", { ...about, expectedFiles: files.length });
  const form = new FormData();
  form.append("data", JSON.stringify({ vid, creatorID: about.creatorID }));
  for (const file of files) form.append("file", file);
  const response = await request(address("cloudinit/metadata"), { method: "POST", body: form });
  const { warnings } = (await response.json()) as Metadata;
  volumeChanged(vid);
  for (const warning of warnings) toast("warning", warning);
  return vid;
}

function Editor(props: {
  id: string;
  label: string;
  value: string;
  onChange: (value: string) => void;
  findings: readonly Finding[];
  rows: number;
}): ReactNode {
  const { findings } = props;
  const isWrong = findings.some((one) => one.kind === "error");
  return (
    <FormGroup label={props.label} fieldId={props.id}>
      <TextArea
        id={props.id}
        value={props.value}
        rows={props.rows}
        spellCheck={false}
        wrap="off"
        resizeOrientation="vertical"
        className="es-editor"
        validated={isWrong ? "error" : findings.length > 0 ? "warning" : "success"}
        aria-describedby={`${props.id}-findings`}
        onChange={(_event, value) => props.onChange(value)}
      />
      <div id={`${props.id}-findings`} role="status" className="es-findings">
        {findings.length === 0 && <span className="es-muted">Good YAML.</span>}
        {findings.map((one) => (
          <Alert
            key={`${one.line} ${one.text}`}
            variant={one.kind === "error" ? "danger" : "warning"}
            isPlain
            title={one.line === null ? one.text : `Line ${one.line}: ${one.text}`}
          />
        ))}
      </div>
    </FormGroup>
  );
}

function Wishes({ onWrite }: { onWrite: (userData: string) => void }): ReactNode {
  const [hostname, setHostname] = useState("");
  const [user, setUser] = useState("debian");
  const [sshKeys, setSshKeys] = useState("");
  const [packages, setPackages] = useState("");
  return (
    <div className="es-stack es-stack-tight">
      <TextField id="hostname" label="Host name" value={hostname} onChange={setHostname} />
      <TextField id="user" label="User, who may become root" value={user} onChange={setUser} />
      <FormGroup label="SSH public keys, one a line" fieldId="keys">
        <TextArea id="keys" rows={3} spellCheck={false} value={sshKeys} onChange={(_event, value) => setSshKeys(value)} />
      </FormGroup>
      <TextField id="packages" label="Packages" value={packages} onChange={setPackages} placeholder="nginx git" />
      <div>
        <Button variant="secondary" onClick={() => onWrite(writeUserData({ hostname, user, sshKeys, packages }))}>
          Write it
        </Button>
      </div>
    </div>
  );
}
