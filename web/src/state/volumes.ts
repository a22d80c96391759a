import { ApiError, call, listVolumes } from "../api/client";
import type { Volume } from "../api/types";
import { Store } from "./store";

/** All volumes that the session may see. `loading` while the first page is not there. */
export interface Volumes {
  byId: ReadonlyMap<string, Volume>;
  loading: boolean;
  error: string | null;
}

const NOTHING: Volumes = { byId: new Map(), loading: true, error: null };
const GATHER_MS = 150;
const MOST_SINGLE = 25; // more changes than this at once: reading the list is cheaper than asking for each

export const volumes = new Store<Volumes>(NOTHING);

let viewer = "";
let round = 0;
let pending = new Set<string>();
let timer: number | undefined;

export function watchVolumes(asViewer: string): void {
  viewer = asViewer;
  volumes.set(NOTHING);
  void reloadVolumes();
}

export async function reloadVolumes(): Promise<void> {
  const mine = ++round;
  pending.clear();
  try {
    const byId = new Map<string, Volume>();
    for await (const page of listVolumes(viewer)) {
      if (mine !== round) return;
      for (const volume of page) byId.set(volume.volumeID, volume);
    }
    if (mine === round) volumes.set({ byId, loading: false, error: null });
  } catch (error) {
    if (mine === round) {
      volumes.update((before) => ({ ...before, loading: false, error: error instanceof Error ? error.message : "" }));
    }
  }
}

/** Something about this volume is different: ask for it, together with what else changes at about the same time. */
export function volumeChanged(id: string): void {
  pending.add(id);
  timer ??= window.setTimeout(() => {
    timer = undefined;
    void readPending();
  }, GATHER_MS);
}

export function volumeRemoved(id: string): void {
  pending.delete(id);
  put(new Map([[id, null]]));
}

async function readPending(): Promise<void> {
  const ids = [...pending];
  pending = new Set();
  if (ids.length > MOST_SINGLE) {
    await reloadVolumes();
    return;
  }
  const mine = round;
  const found = await Promise.all(ids.map((id) => ask(id).catch(() => undefined)));
  if (mine === round) put(new Map(ids.map((id, index) => [id, found[index]])));
}

/** Ask for one volume now. */
export async function readVolume(id: string): Promise<void> {
  const mine = round;
  const volume = await ask(id);
  if (mine === round) put(new Map([[id, volume]]));
}

/** The volume, or null when it is not there for this viewer. */
async function ask(id: string): Promise<Volume | null> {
  try {
    return await call("info", { volume_id: id, client_uid: viewer });
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) return null;
    throw error;
  }
}

/** Undefined: nothing is known of it, so it stays as it was. */
function put(changes: ReadonlyMap<string, Volume | null | undefined>): void {
  volumes.update((before) => {
    const byId = new Map(before.byId);
    for (const [id, volume] of changes) {
      if (volume === null) byId.delete(id);
      else if (volume !== undefined) byId.set(id, volume);
    }
    return { ...before, byId };
  });
}
