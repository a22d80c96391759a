import { useCallback, useEffect, useRef, useState } from "react";

/** Something read from the server, and again when `key` changes, when asked to, and every `everyMs`. */
export interface Resource<T> {
  value: T | undefined;
  error: string | null;
  reload: () => void;
}

export function useResource<T>(read: () => Promise<T>, key: string, everyMs?: number): Resource<T> {
  const [state, setState] = useState<{ key: string; value: T | undefined; error: string | null }>({
    key,
    value: undefined,
    error: null,
  });
  const reader = useRef(read);
  reader.current = read;
  const round = useRef(0);
  const reload = useCallback(() => {
    const mine = ++round.current;
    reader.current().then(
      (value) => {
        if (mine === round.current) setState({ key, value, error: null });
      },
      (error: unknown) => {
        if (mine !== round.current) return;
        const message = error instanceof Error ? error.message : String(error);
        setState((before) => ({ key, value: before.key === key ? before.value : undefined, error: message }));
      },
    );
  }, [key]);
  useEffect(() => {
    reload();
    const rounds = round;
    const timer =
      everyMs === undefined
        ? undefined
        : window.setInterval(() => {
            if (document.visibilityState === "visible") reload();
          }, everyMs);
    return () => {
      rounds.current++;
      window.clearInterval(timer);
    };
  }, [reload, everyMs]);
  const current = state.key === key;
  return { value: current ? state.value : undefined, error: current ? state.error : null, reload };
}
