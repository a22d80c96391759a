import { Button } from "@patternfly/react-core";
import type { ReactNode } from "react";
import { cancelJob } from "../api/client";
import type { Job } from "../api/types";
import { isOver, refreshJob } from "../state/jobs";
import { clientOf } from "../state/session";
import { failed } from "../state/toasts";
import { useStore } from "../state/store";
import { volumes } from "../state/volumes";
import { Bar } from "./Bar";
import { bytes, duration, percent } from "./format";
import { href } from "./route";
import { useSession } from "./session-context";

/** One job, with its progress and a way to stop it. */
export function JobLine({ job }: { job: Job }): ReactNode {
  const session = useSession();
  const name = useStore(volumes).byId.get(job.volume_id ?? "")?.name;
  const client = clientOf(session);
  const rate = job.rate === null || job.rate === undefined ? "" : `${bytes(job.rate)}/s`;
  const eta = duration(job.eta);
  const told = [percent(job.progress), job.phase, rate, eta && `${eta} left`].filter(Boolean).join(" · ");
  const stop = async (): Promise<void> => {
    try {
      await cancelJob(job.job, client);
      await refreshJob(job.job);
    } catch (error) {
      failed("The job cannot be cancelled", error);
    }
  };
  return (
    <div className="es-job">
      <div className="es-job-main">
        <Bar
          title={
            <>
              {job.purpose}
              {name !== undefined && job.volume_id !== null && (
                <>
                  {" "}
                  <a href={href("volumes", job.volume_id)}>{name}</a>
                </>
              )}
            </>
          }
          label={`${job.purpose} ${name ?? ""}`}
          told={told}
          fraction={job.progress}
        />
      </div>
      {!isOver(job) && (
        <Button
          variant="secondary"
          size="sm"
          isDisabled={job.state === "cancelling"}
          onClick={() => void stop()}
          aria-label={`Cancel ${job.purpose} ${name ?? ""}`}
        >
          {job.state === "cancelling" ? "Stopping…" : "Cancel"}
        </Button>
      )}
    </div>
  );
}
