import { follow } from "../api/events";
import { jobSaid, watchJobs } from "./jobs";
import { Store } from "./store";
import { reloadVolumes, volumeChanged, volumeRemoved, watchVolumes } from "./volumes";

/** Whether the page hears of changes as they happen. */
export const live = new Store<boolean>(false);
/** Counts events about exports and migrations: what shows those reads them again. */
export const exportsRevision = new Store<number>(0);

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 15_000;

/** Read everything, then follow the server's events until `stop` is called. */
export function goLive(viewer: string, client: string | undefined): () => void {
  const stopping = new AbortController();
  void run(viewer, client, stopping.signal);
  return () => {
    stopping.abort();
    live.set(false);
  };
}

async function run(viewer: string, client: string | undefined, signal: AbortSignal): Promise<void> {
  let seen: string | null = null;
  let wait = FIRST_WAIT_MS;
  let first = true;
  while (!signal.aborted) {
    try {
      for await (const event of follow(client, seen, signal)) {
        if (event.kind === "hello") {
          live.set(true);
          wait = FIRST_WAIT_MS;
          if (first || event.data.complete !== true) {
            // Whatever changes after this is told by an event, so the lists cannot miss anything.
            if (first) watchVolumes(viewer);
            else void reloadVolumes();
            void watchJobs(client);
            exportsRevision.update((count) => count + 1);
          }
          first = false;
          seen = String(event.data.revision);
        } else {
          handle(event.kind, event.data);
          if (event.id !== null) seen = event.id;
        }
      }
    } catch {
      // Told by `live`; the next try says more.
    }
    if (signal.aborted) return;
    live.set(false);
    if (first) {
      watchVolumes(viewer);
      void watchJobs(client);
    }
    await new Promise((resolve) => window.setTimeout(resolve, wait));
    wait = Math.min(2 * wait, LONGEST_WAIT_MS);
  }
}

function handle(kind: string, data: Readonly<Record<string, unknown>>): void {
  const subject = String(data.subject);
  if (kind === "volume.removed") volumeRemoved(subject);
  else if (kind.startsWith("volume.")) volumeChanged(subject);
  else if (kind === "job") {
    if (jobSaid(subject, data) && typeof data.volume_id === "string") volumeChanged(data.volume_id);
  } else if (kind === "export" || kind === "migration") exportsRevision.update((count) => count + 1);
  if (kind === "volume.changed") exportsRevision.update((count) => count + 1);
}
