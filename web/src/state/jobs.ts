import { call, getJob } from "../api/client";
import type { Job } from "../api/types";
import { toast } from "./toasts";
import { Store } from "./store";

/** The jobs that run or ended of late, by id. */
export const jobs = new Store<ReadonlyMap<string, Job>>(new Map());

const mine = new Map<string, string>(); // jobs that this page began, and what to say of them
let client: string | undefined;

export function isOver(job: Job): boolean {
  return job.state !== "running" && job.state !== "cancelling";
}

export async function watchJobs(asClient: string | undefined): Promise<void> {
  client = asClient;
  const found = await call("jobs", client === undefined ? {} : { client_uid: client }).catch(() => []);
  jobs.set(new Map(found.map((job) => [job.job, job])));
  for (const job of found) settle(job);
}

/** Tell how this job ends, in a notice. */
export function announceJob(id: string, title: string): void {
  mine.set(id, title);
  void refreshJob(id);
}

export async function refreshJob(id: string): Promise<void> {
  const job = await getJob(id, client).catch(() => null);
  if (job === null) return;
  jobs.update((before) => new Map(before).set(id, job));
  settle(job);
}

/** What an event says of a job. True when that is new or its last word, so that its volume may be another now. */
export function jobSaid(id: string, data: Readonly<Record<string, unknown>>): boolean {
  const known = jobs.get().get(id);
  if (known === undefined) {
    void refreshJob(id);
    return true;
  }
  const state = typeof data.state === "string" ? data.state : known.state;
  const job: Job = {
    ...known,
    state,
    progress: typeof data.progress === "number" ? data.progress : known.progress,
    phase: typeof data.phase === "string" ? data.phase : known.phase,
  };
  jobs.update((before) => new Map(before).set(id, job));
  if (!isOver(job)) return false;
  if (!isOver(known) || known.ended === null) void refreshJob(id);
  return true;
}

function settle(job: Job): void {
  const title = mine.get(job.job);
  if (title === undefined || !isOver(job)) return;
  mine.delete(job.job);
  if (job.state === "done") toast("success", `${title}: done`);
  else toast("danger", `${title}: ${job.state}`, job.error?.error);
}
