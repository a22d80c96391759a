const UNITS = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
const counts = new Intl.NumberFormat("en");

/** Bytes in units of 1000, as the API counts. */
export function bytes(count: number | null | undefined): string {
  if (count === null || count === undefined) return "–";
  let value = count;
  let unit = 0;
  while (Math.abs(value) >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit++;
  }
  const digits = unit === 0 || value >= 100 || Number.isInteger(value) ? 0 : value >= 10 ? 1 : 2;
  return `${Number(value.toFixed(digits))} ${UNITS[unit] ?? ""}`;
}

export function number(count: number | null | undefined): string {
  return count === null || count === undefined ? "–" : counts.format(count);
}

/** `2025-02-05 23:34:07.1850`, UTC, as the API writes it. */
export function parseTime(text: string): Date {
  return new Date(/[zZ]|[+-]\d\d:?\d\d$/.test(text) ? text : `${text.replace(" ", "T")}Z`);
}

const absolute = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

export function time(text: string | null | undefined): string {
  if (!text) return "–";
  const when = parseTime(text);
  return Number.isNaN(when.getTime()) ? text : absolute.format(when);
}

export function ago(text: string | null | undefined, now = Date.now()): string {
  if (!text) return "–";
  const seconds = (parseTime(text).getTime() - now) / 1000;
  const steps: [Intl.RelativeTimeFormatUnit, number][] = [
    ["day", 86_400],
    ["hour", 3600],
    ["minute", 60],
  ];
  for (const [unit, length] of steps) {
    if (Math.abs(seconds) >= length) return relative.format(Math.round(seconds / length), unit);
  }
  return Math.abs(seconds) < 5 ? "just now" : relative.format(Math.round(seconds), "second");
}

export function duration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export function percent(fraction: number): string {
  return `${Math.round(fraction * 100)} %`;
}

export function shortUid(uid: string): string {
  return `${uid.slice(0, 8)}…`;
}
