import { Store, useStore } from "../state/store";

/** Where the page is: the address behind `#/`. The server knows one address only, so a reload finds it again. */
function read(): string {
  return window.location.hash.replace(/^#\/?/, "");
}

const route = new Store<string>(read());
window.addEventListener("hashchange", () => route.set(read()));

export function useRoute(): readonly string[] {
  return useStore(route).split("/").map(decodeURIComponent);
}

export function href(...parts: string[]): string {
  return `#/${parts.map(encodeURIComponent).join("/")}`;
}

export function go(...parts: string[]): void {
  window.location.hash = href(...parts);
}
