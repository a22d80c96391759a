import {
  Button,
  Card,
  CardBody,
  CardTitle,
  DescriptionList,
  DescriptionListDescription,
  DescriptionListGroup,
  DescriptionListTerm,
  Divider,
  Dropdown,
  DropdownItem,
  DropdownList,
  EmptyState,
  EmptyStateBody,
  Label,
  MenuToggle,
  Spinner,
} from "@patternfly/react-core";
import { type ReactNode, useEffect, useState } from "react";
import type { Volume } from "../api/types";
import { isOver, jobs } from "../state/jobs";
import { mayChange, type Session } from "../state/session";
import { useStore } from "../state/store";
import { readVolume, volumes } from "../state/volumes";
import { bytes, number, percent, time } from "../ui/format";
import { go } from "../ui/route";
import { JobLine } from "../ui/JobLine";
import { useSession } from "../ui/session-context";
import { View } from "../ui/View";
import {
  CloneVolume,
  CompactVolume,
  ConvertVolume,
  destroyVolume,
  EditVolume,
  ResetVolume,
  ResizeVolume,
  TransferVolume,
} from "./dialogs/ChangeVolume";
import { DownloadVolume } from "./dialogs/DownloadVolume";
import { ExportVolume } from "./dialogs/ExportVolume";
import { marksOf } from "./VolumeMarks";
import { VolumeExports } from "./VolumeExports";
import { VolumeSnapshots } from "./VolumeSnapshots";
import { Alert } from "../ui/Note";

const DIALOGS = {
  edit: EditVolume,
  resize: ResizeVolume,
  convert: ConvertVolume,
  clone: CloneVolume,
  transfer: TransferVolume,
  reset: ResetVolume,
  compact: CompactVolume,
  download: DownloadVolume,
  export: ExportVolume,
} as const;
type DialogName = keyof typeof DIALOGS;

const COLOURS = { busy: "blue", good: "green", warn: "orange", plain: "grey" } as const;

export default function VolumeView({ id }: { id: string }): ReactNode {
  const session = useSession();
  const { byId, loading } = useStore(volumes);
  const volume = byId.get(id);
  const [open, setOpen] = useState<DialogName | null>(null);
  useEffect(() => void readVolume(id).catch(() => undefined), [id]);
  if (volume === undefined) {
    return (
      <View title={loading ? "Volume" : "No such volume"} under={{ label: "Volumes", route: "volumes" }}>
        {loading ? (
          <Spinner aria-label="Loading" />
        ) : (
          <EmptyState titleText="It is not there" headingLevel="h2">
            <EmptyStateBody>It was destroyed, or belongs to somebody else. What was destroyed of late is in the bin.</EmptyStateBody>
          </EmptyState>
        )}
      </View>
    );
  }
  const Chosen = open === null ? null : DIALOGS[open];
  return (
    <View
      title={volume.name || "(no name)"}
      under={{ label: "Volumes", route: "volumes" }}
      labels={marksOf(volume).map(([kind, text]) => (
        <Label key={text} color={COLOURS[kind as keyof typeof COLOURS] ?? "grey"} isCompact>
          {text}
        </Label>
      ))}
      actions={
        <>
          <Button onClick={() => setOpen("export")} isDisabled={volume.waiting === true}>
            Export
          </Button>
          <Actions volume={volume} session={session} onChoose={setOpen} />
        </>
      }
    >
      <div className="es-stack">
        <Busy volume={volume} />
        <div className="es-columns">
          <Card isCompact>
            <CardTitle component="h2">Details</CardTitle>
            <CardBody>
              <Details volume={volume} />
            </CardBody>
          </Card>
          <div className="es-stack">
            <VolumeExports volume={volume} />
            {volume.format !== "iso" && <VolumeSnapshots volume={volume} />}
          </div>
        </div>
      </div>
      {Chosen !== null && <Chosen volume={volume} session={session} onClose={() => setOpen(null)} />}
    </View>
  );
}

function Busy({ volume }: { volume: Volume }): ReactNode {
  const known = useStore(jobs);
  const job = [...known.values()].find((one) => one.volume_id === volume.volumeID && !isOver(one));
  if (job !== undefined) return <JobLine job={job} />;
  if (volume.locked === undefined) return null;
  return (
    <Alert variant="info" title={`Busy: ${volume.locked.purpose}`}>
      {volume.locked.shared === true ? "It can be read meanwhile." : "It can be changed when that is over."}
    </Alert>
  );
}

function Actions(props: { volume: Volume; session: Session; onChoose: (name: DialogName) => void }): ReactNode {
  const { volume, session, onChoose } = props;
  const [open, setOpen] = useState(false);
  const owned = mayChange(session, volume);
  const isIso = volume.format === "iso";
  const isImage = volume.format === "raw" || volume.format === "qcow2";
  const item = (name: DialogName, label: string, isPossible = true): ReactNode => (
    <DropdownItem key={name} isDisabled={!isPossible} onClick={() => onChoose(name)}>
      {label}
    </DropdownItem>
  );
  return (
    <Dropdown
      isOpen={open}
      onOpenChange={setOpen}
      onSelect={() => setOpen(false)}
      popperProps={{ position: "right", appendTo: "inline" }}
      toggle={(ref) => (
        <MenuToggle ref={ref} isExpanded={open} onClick={() => setOpen(!open)}>
          Actions
        </MenuToggle>
      )}
    >
      <DropdownList>
        {item("edit", "Edit…", owned)}
        {item("resize", "Resize…", owned && isImage)}
        {item("convert", volume.format === "raw" ? "Convert to qcow2…" : "Convert to raw…", owned && isImage)}
        {item("clone", "Clone…", volume.clonable && volume.waiting !== true)}
        {item("download", "Download…", volume.waiting !== true)}
        {volume.linked === true && item("compact", "Make independent…", owned)}
        {item("transfer", "Give away…", owned)}
        <Divider component="li" key="line" />
        {item("reset", "Reset…", owned && !isIso)}
        <DropdownItem
          key="destroy"
          isDanger
          isDisabled={!owned}
          onClick={() => {
            void destroyVolume(volume, session).then((gone) => {
              if (gone) go("volumes");
            });
          }}
        >
          Destroy
        </DropdownItem>
      </DropdownList>
    </Dropdown>
  );
}

function Details({ volume }: { volume: Volume }): ReactNode {
  const flags = [
    volume.private && "private",
    volume.bootable && "bootable",
    volume.readonly && "read-only",
    volume.shareable && "shareable",
    volume.cloudinit && "from a cloud image",
    !volume.clonable && "not to be cloned",
  ].filter((flag): flag is string => typeof flag === "string");
  const iso = [volume.iso_type, volume.os_family, volume.os_flavour, volume.os_version, volume.tool_scope, volume.tool_version];
  const rows: readonly (readonly [string, ReactNode])[] = [
    ["Id", <code className="es-path">{volume.volumeID}</code>],
    ["Owner", <code className="es-path">{volume.creatorID}</code>],
    ["Size", `${bytes(volume.size)} (${number(volume.size)} bytes)`],
    ["On disk", `${bytes(volume.sizeOnDisk)}, ${percent(volume.size > 0 ? volume.sizeOnDisk / volume.size : 0)}`],
    ["Format", volume.format],
    ["Bus", volume.bus],
    ["Location", volume.location],
    ["Written", time(volume.lastUpdated)],
    ["Is", flags.join(", ") || "–"],
    ...(volume.format === "iso" ? ([["Holds", iso.filter(Boolean).join(" ") || "–"]] as const) : []),
  ];
  return (
    <DescriptionList isHorizontal isCompact horizontalTermWidthModifier={{ default: "6rem" }}>
      {rows.map(([term, told]) => (
        <DescriptionListGroup key={term}>
          <DescriptionListTerm>{term}</DescriptionListTerm>
          <DescriptionListDescription>{told}</DescriptionListDescription>
        </DescriptionListGroup>
      ))}
    </DescriptionList>
  );
}
