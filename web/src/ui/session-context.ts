import { createContext, useContext } from "react";
import type { Session } from "../state/session";

export const SessionContext = createContext<Session | null>(null);

/** The session of whoever is in; only below the shell. */
export function useSession(): Session {
  const session = useContext(SessionContext);
  if (session === null) throw new Error("nobody is in");
  return session;
}
