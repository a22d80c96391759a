import { Content, EmptyState, EmptyStateBody, Label } from "@patternfly/react-core";
import type { ReactNode } from "react";
import type { Job } from "../api/types";
import { isOver, jobs } from "../state/jobs";
import { useStore } from "../state/store";
import { volumes } from "../state/volumes";
import { ago } from "../ui/format";
import { JobLine } from "../ui/JobLine";
import { href } from "../ui/route";
import { View } from "../ui/View";

const STATUS: Readonly<Record<string, "success" | "danger" | "warning" | "info">> = {
  done: "success",
  failed: "danger",
  cancelled: "warning",
  interrupted: "warning",
};

export default function Jobs(): ReactNode {
  const all = [...useStore(jobs).values()].toSorted((a, b) => b.created.localeCompare(a.created));
  const running = all.filter((job) => !isOver(job));
  const over = all.filter(isOver);
  return (
    <View title="Jobs" intro="What takes longer than a blink. It goes on when this page is closed.">
      {all.length === 0 && (
        <EmptyState titleText="Nothing ran of late" headingLevel="h2">
          <EmptyStateBody>Jobs that are over stay here for an hour.</EmptyStateBody>
        </EmptyState>
      )}
      <div className="es-stack">
        {running.length > 0 && (
          <section aria-labelledby="running">
            <Content component="h2" id="running">
              Running
            </Content>
            <ul className="es-items">
              {running.map((job) => (
                <li key={job.job}>
                  <JobLine job={job} />
                </li>
              ))}
            </ul>
          </section>
        )}
        {over.length > 0 && (
          <section aria-labelledby="over">
            <Content component="h2" id="over">
              Over
            </Content>
            <ul className="es-items es-lined">
              {over.map((job) => (
                <Over key={job.job} job={job} />
              ))}
            </ul>
          </section>
        )}
      </div>
    </View>
  );
}

function Over({ job }: { job: Job }): ReactNode {
  const result = job.result as { vid?: string; name?: string } | null | undefined;
  const id = job.volume_id ?? result?.vid;
  const name = useStore(volumes).byId.get(id ?? "")?.name ?? result?.name;
  return (
    <li className="es-item">
      <div>
        <strong>{job.purpose}</strong> {id && name !== undefined && <a href={href("volumes", id)}>{name}</a>}
        {job.error && <div className="es-small">{String(job.error.error)}</div>}
      </div>
      <span className="es-muted es-small">
        {ago(job.ended ?? job.created)}{" "}
        <Label status={STATUS[job.state] ?? "info"} isCompact>
          {job.state}
        </Label>
      </span>
    </li>
  );
}
