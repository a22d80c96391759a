import { ApiError, authenticate, call } from "../api/client";
import type { Volume, WhoAmI } from "../api/types";
import { Store } from "./store";

/** Stands for everybody where the API wants a client to be named, for those who may see everything. */
export const EVERYBODY = "0".repeat(32);

const TOKEN = "elemento-token";
const ACTING = "elemento-acting";
const OWNER = "elemento-owner";

/**
 * Who uses the page. `acting` is the client on whose behalf an administrator looks; null: everybody's.
 *
 * The token is kept in sessionStorage: it survives a reload, which a resumed upload needs, and goes with the tab. No
 * script but the page's own can run here to read it, see docs/security.md.
 */
export interface Session {
  who: WhoAmI;
  acting: string | null;
}

export type SessionState =
  | { kind: "asking" }
  | { kind: "unreachable"; message: string }
  | { kind: "logged-out"; message: string | null }
  | { kind: "in"; session: Session };

export const sessionState = new Store<SessionState>({ kind: "asking" });

/** At start: straight in where no token is needed, or with the one this tab had. */
export async function arrive(): Promise<void> {
  sessionState.set({ kind: "asking" });
  await enter(sessionStorage.getItem(TOKEN), null);
}

export async function logIn(token: string): Promise<void> {
  await enter(token.trim(), "This token is not known here, or was revoked.");
}

async function enter(token: string | null, onUnknown: string | null): Promise<void> {
  authenticate(token, refused);
  try {
    const who = await call("whoami", {});
    if (token !== null && who.client !== null) sessionStorage.setItem(TOKEN, token);
    const acting = who.role === "admin" ? sessionStorage.getItem(ACTING) : null;
    sessionState.set({ kind: "in", session: { who, acting } });
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) {
      forget();
      sessionState.set({ kind: "logged-out", message: onUnknown });
    } else {
      sessionState.set({ kind: "unreachable", message: error instanceof Error ? error.message : String(error) });
    }
  }
}

export function logOut(): void {
  forget();
  sessionState.set({ kind: "logged-out", message: null });
}

function refused(): void {
  if (sessionState.get().kind !== "in") return;
  forget();
  sessionState.set({ kind: "logged-out", message: "The token is no longer valid. Log in with another one." });
}

function forget(): void {
  authenticate(null, refused);
  sessionStorage.removeItem(TOKEN);
  sessionStorage.removeItem(ACTING);
}

export function actAs(client: string | null): void {
  const state = sessionState.get();
  if (state.kind !== "in") return;
  if (client === null) sessionStorage.removeItem(ACTING);
  else sessionStorage.setItem(ACTING, client);
  sessionState.set({ kind: "in", session: { ...state.session, acting: client } });
}

/** Where a client may be named to look on its behalf. */
export function clientOf(session: Session): string | undefined {
  return session.acting ?? (session.who.role === "user" ? (session.who.client ?? undefined) : undefined);
}

/** Where a client has to be named. */
export function viewerOf(session: Session): string {
  return clientOf(session) ?? EVERYBODY;
}

/** As whom a volume is changed. An administrator who looks at everybody's volumes acts for their owners. */
export function changerOf(session: Session, volume: { creatorID: string }): string {
  return clientOf(session) ?? volume.creatorID;
}

export function mayChange(session: Session, volume: Volume): boolean {
  return changerOf(session, volume) === volume.creatorID;
}

/** Who will own what is made now, unless somebody else is named. */
export function defaultOwner(session: Session): string {
  return clientOf(session) ?? session.who.client ?? localStorage.getItem(OWNER) ?? "f".repeat(32);
}

export function rememberOwner(session: Session, owner: string): void {
  if (session.who.client === null && clientOf(session) === undefined) localStorage.setItem(OWNER, owner);
}

export function normaliseUid(text: string): string | null {
  const digits = text.trim().replaceAll("-", "").toLowerCase();
  return /^[0-9a-f]{32}$/.test(digits) ? digits : null;
}
