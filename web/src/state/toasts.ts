import { Store } from "./store";

/** A notice in the corner. Successes go by themselves; what went wrong stays until it is closed. */
export interface Toast {
  id: number;
  variant: "success" | "danger" | "info" | "warning";
  title: string;
  detail: string | undefined;
  action: { label: string; run: () => void } | undefined;
}

const STAYS_MS = 8000;

export const toasts = new Store<readonly Toast[]>([]);
let last = 0;

export function toast(variant: Toast["variant"], title: string, detail?: string, action?: Toast["action"]): void {
  const id = ++last;
  toasts.update((before) => [...before.slice(-4), { id, variant, title, detail, action }]);
  if (variant !== "danger") window.setTimeout(() => dismiss(id), action === undefined ? STAYS_MS : 2 * STAYS_MS);
}

export function dismiss(id: number): void {
  toasts.update((before) => before.filter((one) => one.id !== id));
}

export function failed(what: string, error: unknown): void {
  toast("danger", what, error instanceof Error ? error.message : String(error));
}
