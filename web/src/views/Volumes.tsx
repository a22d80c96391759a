import {
  Button,
  EmptyState,
  EmptyStateBody,
  FormSelect,
  FormSelectOption,
  SearchInput,
} from "@patternfly/react-core";
import { type ReactNode, useDeferredValue, useMemo, useState } from "react";
import type { Volume } from "../api/types";
import { useStore } from "../state/store";
import { reloadVolumes, volumes } from "../state/volumes";
import { ago, bytes, number, parseTime, shortUid } from "../ui/format";
import { href } from "../ui/route";
import { useSession } from "../ui/session-context";
import { View } from "../ui/View";
import { type Column, VirtualTable } from "../ui/VirtualTable";
import { CreateVolume } from "./dialogs/CreateVolume";
import { VolumeMarks } from "./VolumeMarks";
import { Alert } from "../ui/Note";

type Filter = (volume: Volume) => boolean;

const STATES: Readonly<Record<string, readonly [label: string, filter: Filter]>> = {
  all: ["In any state", () => true],
  exported: ["Exported", (volume) => volume.exported],
  idle: ["Not exported", (volume) => !volume.exported],
  locked: ["Busy", (volume) => volume.locked !== undefined],
  private: ["Private", (volume) => volume.private],
  bootable: ["Bootable", (volume) => volume.bootable],
  cloudinit: ["From a cloud image", (volume) => volume.cloudinit],
  linked: ["Linked clones", (volume) => volume.linked === true],
};

const COLUMNS: readonly Column<Volume>[] = [
  {
    key: "name",
    label: "Name",
    always: true,
    sort: (volume) => volume.name,
    cell: (volume) => (
      <span className="es-name">
        <a href={href("volumes", volume.volumeID)} className="es-name-link">
          {volume.name || "(no name)"}
        </a>
        <VolumeMarks volume={volume} />
      </span>
    ),
  },
  {
    key: "size",
    label: "Size",
    always: true,
    isNumber: true,
    width: "6.5rem",
    sort: (volume) => volume.size,
    cell: (volume) => bytes(volume.size),
  },
  {
    key: "onDisk",
    label: "On disk",
    isNumber: true,
    width: "7rem",
    sort: (volume) => volume.sizeOnDisk,
    cell: (volume) => bytes(volume.sizeOnDisk),
  },
  { key: "format", label: "Format", width: "5.5rem", sort: (volume) => volume.format, cell: (volume) => volume.format },
  {
    key: "location",
    label: "Location",
    width: "8rem",
    sort: (volume) => volume.location,
    cell: (volume) => volume.location,
  },
  {
    key: "owner",
    label: "Owner",
    width: "7.5rem",
    sort: (volume) => volume.creatorID,
    cell: (volume) => (
      <code title={volume.creatorID} className="es-uid">
        {shortUid(volume.creatorID)}
      </code>
    ),
  },
  {
    key: "updated",
    label: "Written",
    width: "8rem",
    sort: (volume) => parseTime(volume.lastUpdated).getTime(),
    cell: (volume) => ago(volume.lastUpdated),
  },
];

function matcher(text: string): Filter {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  return (volume) => {
    const told = `${volume.name} ${volume.volumeID} ${volume.creatorID}`.toLowerCase();
    return words.every((word) => told.includes(word));
  };
}

export default function Volumes(): ReactNode {
  const { byId, loading, error } = useStore(volumes);
  const session = useSession();
  const [text, setText] = useState("");
  const [format, setFormat] = useState("");
  const [location, setLocation] = useState("");
  const [state, setState] = useState("all");
  const [creating, setCreating] = useState(false);
  const sought = useDeferredValue(text);
  const all = useMemo(() => [...byId.values()], [byId]);
  const formats = useMemo(() => [...new Set(all.map((volume) => volume.format))].sort(), [all]);
  const places = useMemo(() => [...new Set(all.map((volume) => volume.location))].sort(), [all]);
  const shown = useMemo(() => {
    const matches = matcher(sought);
    const inState = STATES[state]?.[1] ?? (() => true);
    return all.filter(
      (volume) =>
        (format === "" || volume.format === format) &&
        (location === "" || volume.location === location) &&
        inState(volume) &&
        matches(volume),
    );
  }, [all, sought, format, location, state]);
  const unfiltered = shown.length === all.length;
  return (
    <View
      title="Volumes"
      fills
      actions={<Button onClick={() => setCreating(true)}>Create volume</Button>}
    >
      <div className="es-filters">
        <SearchInput
          aria-label="Search by name, id or owner"
          placeholder="Name, id or owner"
          value={text}
          onChange={(_event, value) => setText(value)}
          onClear={() => setText("")}
          className="es-search"
        />
        <Choice label="Format" value={format} onChange={setFormat} all="All formats" options={formats} />
        <Choice label="Location" value={location} onChange={setLocation} all="All locations" options={places} />
        <FormSelect
          aria-label="State"
          value={state}
          onChange={(_event, value) => setState(value)}
          className="es-choice"
        >
          {Object.entries(STATES).map(([key, [label]]) => (
            <FormSelectOption key={key} value={key} label={label} />
          ))}
        </FormSelect>
        <span role="status" className="es-count">
          {loading ? "Loading…" : unfiltered ? `${number(all.length)} volumes` : `${number(shown.length)} of ${number(all.length)} volumes`}
        </span>
      </div>
      {error !== null && (
        <Alert
          variant="danger"
          title={error}
          actionLinks={
            <Button variant="link" isInline onClick={() => void reloadVolumes()}>
              Try again
            </Button>
          }
        />
      )}
      <VirtualTable
        label="Volumes"
        rows={shown}
        columns={COLUMNS}
        rowKey={(volume) => volume.volumeID}
        initial={{ key: "name", descending: false }}
        empty={
          !loading && (
            <EmptyState titleText={unfiltered ? "No volumes yet" : "No volume is like that"} headingLevel="h2">
              <EmptyStateBody>
                {unfiltered ? "Create an empty one, upload an image, or fetch one from the web." : "Ask for less."}
              </EmptyStateBody>
            </EmptyState>
          )
        }
      />
      {creating && <CreateVolume session={session} onClose={() => setCreating(false)} />}
    </View>
  );
}

function Choice(props: {
  label: string;
  value: string;
  onChange: (value: string) => void;
  all: string;
  options: readonly string[];
}): ReactNode {
  return (
    <FormSelect
      aria-label={props.label}
      value={props.value}
      onChange={(_event, value) => props.onChange(value)}
      className="es-choice"
    >
      <FormSelectOption value="" label={props.all} />
      {props.options.map((option) => (
        <FormSelectOption key={option} value={option} label={option} />
      ))}
    </FormSelect>
  );
}
