import { Button, EmptyState, EmptyStateBody, Label, SearchInput } from "@patternfly/react-core";
import { type ReactNode, useState } from "react";
import type { Volume } from "../api/types";
import { useStore } from "../state/store";
import { volumes } from "../state/volumes";
import { bytes } from "../ui/format";
import { go, href } from "../ui/route";
import { useSession } from "../ui/session-context";
import { View } from "../ui/View";
import { AddIso } from "./dialogs/AddIso";

function holds(volume: Volume): string {
  const { os_family, os_flavour, os_version, tool_scope, tool_version } = volume;
  return [os_family, os_flavour, os_version, tool_scope, tool_version].filter(Boolean).join(" ");
}

/** ISO images: installers, live systems, drivers. Seeds of cloud-init are ISO volumes too and have their own view. */
export default function Library(): ReactNode {
  const session = useSession();
  const { byId, loading } = useStore(volumes);
  const [text, setText] = useState("");
  const [adding, setAdding] = useState(false);
  const all = [...byId.values()].filter((volume) => volume.format === "iso");
  const sought = text.toLowerCase();
  const shown = all
    .filter((volume) => `${volume.name} ${holds(volume)}`.toLowerCase().includes(sought))
    .toSorted((a, b) => a.name.localeCompare(b.name));
  return (
    <View
      title="ISO library"
      intro="Installers, live systems and drivers. Export one read-only to a virtual machine."
      actions={<Button onClick={() => setAdding(true)}>Add ISO</Button>}
    >
      <div className="es-stack">
        {all.length > 5 && (
          <SearchInput
            aria-label="Search the library"
            value={text}
            onChange={(_event, value) => setText(value)}
            onClear={() => setText("")}
          />
        )}
        {!loading && shown.length === 0 && (
          <EmptyState titleText={all.length === 0 ? "No ISO images yet" : "None is like that"} headingLevel="h2">
            <EmptyStateBody>Fetch one from the web or upload one.</EmptyStateBody>
          </EmptyState>
        )}
        <ul className="es-items es-lined">
          {shown.map((volume) => (
            <li key={volume.volumeID} className="es-item">
              <div>
                <a href={href("volumes", volume.volumeID)}>{volume.name || "(no name)"}</a>{" "}
                {volume.waiting === true && (
                  <Label status="warning" isCompact>
                    no content yet
                  </Label>
                )}{" "}
                {volume.exported && (
                  <Label status="success" isCompact>
                    exported
                  </Label>
                )}
                <div className="es-muted es-small">
                  {[volume.iso_type === "tool" ? "tool" : volume.iso_type && "system", holds(volume), bytes(volume.size)]
                    .filter(Boolean)
                    .join(" · ")}
                </div>
              </div>
              {volume.waiting === true && volume.iso_type !== undefined && (
                <Button
                  variant="secondary"
                  size="sm"
                  aria-label={`Upload its content: ${volume.name}`}
                  onClick={() => go("uploads", "fill", volume.volumeID)}
                >
                  Upload its content
                </Button>
              )}
            </li>
          ))}
        </ul>
      </div>
      {adding && <AddIso session={session} onClose={() => setAdding(false)} />}
    </View>
  );
}
