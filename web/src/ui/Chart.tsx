import { type ReactNode, useId, useState } from "react";

/** One line of a chart. `kind` is how it is drawn, so that colours alone need not tell lines apart. */
export interface Line {
  label: string;
  values: readonly (number | null)[];
  kind: "solid" | "dashed";
}

const WIDTH = 600;
const HEIGHT = 140;

const clock = new Intl.DateTimeFormat("en", { hour: "2-digit", minute: "2-digit", hour12: false });

/** Lines over time. What it shows is also there as words, and as a table for whoever does not see it. */
export function Chart(props: {
  title: string;
  times: readonly number[];
  lines: readonly Line[];
  format: (value: number) => string;
  /** The top of the scale, if it is not the largest value. */
  most?: number;
}): ReactNode {
  const { times, lines, format } = props;
  const id = useId();
  const [at, setAt] = useState<number | null>(null);
  const values = lines.flatMap((line) => line.values).filter((value) => value !== null);
  const top = Math.max(props.most ?? 0, ...values, 1);
  const first = times[0] ?? 0;
  const last = times.at(-1) ?? 1;
  const x = (time: number): number => (last === first ? WIDTH : ((time - first) / (last - first)) * WIDTH);
  const y = (value: number): number => HEIGHT - (value / top) * (HEIGHT - 4);
  const shown = at ?? times.length - 1;
  const moment = times[shown];
  const follow = (event: React.PointerEvent<SVGSVGElement>): void => {
    const box = event.currentTarget.getBoundingClientRect();
    const time = first + ((event.clientX - box.left) / box.width) * (last - first);
    const next = times.findIndex((one) => one >= time);
    setAt(next < 0 ? times.length - 1 : next);
  };
  return (
    <figure className="es-chart" aria-labelledby={`${id}-title`}>
      <figcaption>
        <span id={`${id}-title`} className="es-chart-title">
          {props.title}
        </span>
        <span className="es-legend">
          {lines.map((line) => (
            <span key={line.label} className={`es-key es-key-${line.kind}`}>
              {line.label}: {tell(line.values[shown], format)}
            </span>
          ))}
        </span>
      </figcaption>
      <svg
        viewBox={`0 0 ${WIDTH} ${HEIGHT}`}
        preserveAspectRatio="none"
        aria-hidden="true"
        onPointerMove={follow}
        onPointerLeave={() => setAt(null)}
      >
        {[0.25, 0.5, 0.75].map((part) => (
          <line key={part} className="es-grid" x1={0} x2={WIDTH} y1={HEIGHT * part} y2={HEIGHT * part} />
        ))}
        {lines.map((line) => (
          <path key={line.label} className={`es-line es-line-${line.kind}`} d={pathOf(times, line.values, x, y)} />
        ))}
        {at !== null && moment !== undefined && (
          <line className="es-cursor" x1={x(moment)} x2={x(moment)} y1={0} y2={HEIGHT} />
        )}
      </svg>
      <div className="es-axis" aria-hidden="true">
        <span>{clock.format(first * 1000)}</span>
        <span>{at !== null && moment !== undefined ? clock.format(moment * 1000) : `up to ${format(top)}`}</span>
        <span>{clock.format(last * 1000)}</span>
      </div>
      <table className="es-hidden">
        <caption>{props.title}</caption>
        <thead>
          <tr>
            <th scope="col">Time</th>
            {lines.map((line) => (
              <th key={line.label} scope="col">
                {line.label}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {every(times, 12).map((index) => (
            <tr key={index}>
              <th scope="row">{clock.format((times[index] ?? 0) * 1000)}</th>
              {lines.map((line) => (
                <td key={line.label}>{tell(line.values[index], format)}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </figure>
  );
}

function tell(value: number | null | undefined, format: (value: number) => string): string {
  return value === null || value === undefined ? "–" : format(value);
}

/** About so many indexes, the last among them. */
function every(times: readonly number[], count: number): number[] {
  const step = Math.max(1, Math.ceil(times.length / count));
  return times.map((_time, index) => index).filter((index) => (times.length - 1 - index) % step === 0);
}

function pathOf(
  times: readonly number[],
  values: readonly (number | null)[],
  x: (time: number) => number,
  y: (value: number) => number,
): string {
  let path = "";
  let isDrawing = false;
  times.forEach((time, index) => {
    const value = values[index];
    if (value === null || value === undefined) {
      isDrawing = false;
      return;
    }
    path += `${isDrawing ? "L" : "M"}${x(time).toFixed(1)} ${y(value).toFixed(1)}`;
    isDrawing = true;
  });
  return path;
}
