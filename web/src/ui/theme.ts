import { useSyncExternalStore } from "react";

/** Light, dark, or what the system wants. Kept in the browser. */
export type Theme = "system" | "light" | "dark";

const KEY = "elemento-theme";
const DARK = "pf-v6-theme-dark";
const system = window.matchMedia("(prefers-color-scheme: dark)");
const listeners = new Set<() => void>();

function read(): Theme {
  const kept = localStorage.getItem(KEY);
  return kept === "light" || kept === "dark" ? kept : "system";
}

export function applyTheme(): void {
  const theme = read();
  const dark = theme === "dark" || (theme === "system" && system.matches);
  document.documentElement.classList.toggle(DARK, dark);
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
}

export function setTheme(theme: Theme): void {
  if (theme === "system") localStorage.removeItem(KEY);
  else localStorage.setItem(KEY, theme);
  applyTheme();
  for (const listener of listeners) listener();
}

export function useTheme(): Theme {
  return useSyncExternalStore((listener) => {
    listeners.add(listener);
    return () => listeners.delete(listener);
  }, read);
}

system.addEventListener("change", applyTheme);
