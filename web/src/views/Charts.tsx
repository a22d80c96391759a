import { Content, ToggleGroup, ToggleGroupItem } from "@patternfly/react-core";
import { type ReactNode, useState } from "react";
import { call } from "../api/client";
import { useResource } from "../state/resource";
import { Chart } from "../ui/Chart";
import { bytes } from "../ui/format";
import { Alert } from "../ui/Note";

const EVERY_MS = 30_000;
const SPANS = [1, 6, 24] as const;

/** What went on of late: traffic of the disks, and how full each location was. */
export default function Charts(): ReactNode {
  const [hours, setHours] = useState<number>(1);
  const history = useResource(() => call("history", { hours }), `history ${hours}`, EVERY_MS);
  const found = history.value;
  return (
    <section aria-labelledby="history">
      <div className="es-heading-row">
        <Content component="h2" id="history">
          Of late
        </Content>
        <ToggleGroup aria-label="How long ago" isCompact>
          {SPANS.map((span) => (
            <ToggleGroupItem
              key={span}
              text={`${span} h`}
              buttonId={`span-${span}`}
              isSelected={hours === span}
              onChange={() => setHours(span)}
            />
          ))}
        </ToggleGroup>
      </div>
      {history.error !== null && <Alert variant="danger" title={history.error} />}
      {found !== undefined && found.times.length < 2 && (
        <Content component="p" className="es-muted">
          The server has just begun to look; there will be lines in a minute.
        </Content>
      )}
      {found !== undefined && found.times.length >= 2 && (
        <div className="es-charts">
          <Chart
            title="Traffic of the disks"
            times={found.times}
            format={(value) => `${bytes(value)}/s`}
            lines={[
              { label: "Read", values: found.read_rate, kind: "solid" },
              { label: "Written", values: found.write_rate, kind: "dashed" },
            ]}
          />
          {found.locations.map((location) => (
            <Chart
              key={location.name}
              title={`Location ${location.name}`}
              times={found.times}
              format={bytes}
              lines={[
                { label: "Used on disk", values: location.used_bytes, kind: "solid" },
                { label: "Size of volumes", values: location.virtual_bytes, kind: "dashed" },
              ]}
            />
          ))}
        </div>
      )}
    </section>
  );
}
