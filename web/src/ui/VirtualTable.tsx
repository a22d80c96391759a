import { memo, type ReactNode, useEffect, useLayoutEffect, useMemo, useRef, useState } from "react";

/** One column. `sort` gives what rows are ordered by; without it the column cannot be sorted. */
export interface Column<T> {
  key: string;
  label: string;
  cell: (row: T) => ReactNode;
  sort?: (row: T) => string | number;
  /** Columns without it go when there is little room. */
  always?: boolean;
  isNumber?: boolean;
  width?: string;
}

interface Order {
  key: string;
  descending: boolean;
}

const ROW_PX = 44;
const STEP = 10; // rows by which the window moves: React works once per so many, not once per row
const AROUND = 20;

const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

function compare(a: string | number, b: string | number): number {
  return typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b));
}

/** A table of which only the rows in sight are in the document, whatever their number. */
export function VirtualTable<T>(props: {
  label: string;
  rows: readonly T[];
  columns: readonly Column<T>[];
  rowKey: (row: T) => string;
  initial: Order;
  empty: ReactNode;
}): ReactNode {
  const { rows, columns, rowKey } = props;
  const [order, setOrder] = useState<Order>(props.initial);
  const [start, setStart] = useState(0);
  const [height, setHeight] = useState(800);
  const scroller = useRef<HTMLDivElement>(null);

  const sorted = useMemo(() => {
    const by = columns.find((column) => column.key === order.key)?.sort;
    if (by === undefined) return rows;
    const keyed = rows.map((row) => ({ row, value: by(row) }));
    const sign = order.descending ? -1 : 1;
    keyed.sort((a, b) => sign * compare(a.value, b.value));
    return keyed.map((one) => one.row);
  }, [rows, columns, order]);

  useLayoutEffect(() => {
    const element = scroller.current;
    if (element === null) return;
    const observer = new ResizeObserver(() => setHeight(element.clientHeight));
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  useEffect(() => {
    const element = scroller.current;
    if (element === null) return;
    const follow = (): void => setStart(Math.floor(element.scrollTop / ROW_PX / STEP) * STEP);
    element.addEventListener("scroll", follow, { passive: true });
    return () => element.removeEventListener("scroll", follow);
  }, []);
  useEffect(() => {
    if (scroller.current !== null) scroller.current.scrollTop = 0;
  }, [order]);

  const last = Math.max(0, sorted.length - 1);
  const from = Math.max(0, Math.min(start, last) - AROUND);
  const to = Math.min(sorted.length, start + Math.ceil(height / ROW_PX) + STEP + AROUND);
  const visible = sorted.slice(from, to);
  return (
    <div className="es-scroller" ref={scroller} tabIndex={0} role="region" aria-label={props.label}>
      <table
        className="es-table"
        aria-label={props.label}
        aria-rowcount={sorted.length + 1}
      >
        <thead>
          <tr aria-rowindex={1}>
            {columns.map((column) => (
              <Header key={column.key} column={column} order={order} onOrder={setOrder} />
            ))}
          </tr>
        </thead>
        <tbody>
          <Filler rows={from} />
          {visible.map((row, index) => (
            <MemoRow
              key={rowKey(row)}
              row={row as unknown}
              index={from + index}
              columns={columns as readonly Column<unknown>[]}
            />
          ))}
          <Filler rows={sorted.length - to} />
        </tbody>
      </table>
      {sorted.length === 0 && props.empty}
    </div>
  );
}

function classOf(column: { always?: boolean; isNumber?: boolean }): string {
  return `${column.always ? "" : "es-optional"} ${column.isNumber ? "es-number" : ""}`.trim();
}

function Filler({ rows }: { rows: number }): ReactNode {
  if (rows <= 0) return null;
  return <tr aria-hidden="true" style={{ height: rows * ROW_PX }} />;
}

function Header<T>(props: { column: Column<T>; order: Order; onOrder: (order: Order) => void }): ReactNode {
  const { column, order, onOrder } = props;
  const chosen = order.key === column.key;
  const className = classOf(column);
  const style = column.width === undefined ? undefined : { width: column.width };
  if (column.sort === undefined) {
    return (
      <th className={className} scope="col" style={style}>
        {column.label}
      </th>
    );
  }
  const direction = order.descending ? "descending" : "ascending";
  return (
    <th className={className} scope="col" style={style} aria-sort={chosen ? direction : "none"}>
      <button
        type="button"
        className="es-sort"
        onClick={() => onOrder({ key: column.key, descending: chosen && !order.descending })}
      >
        {column.label}
        <span aria-hidden="true" className="es-sort-mark">
          {chosen ? (order.descending ? "▼" : "▲") : ""}
        </span>
      </button>
    </th>
  );
}

const MemoRow = memo(function Row(props: {
  row: unknown;
  index: number;
  columns: readonly Column<unknown>[];
}): ReactNode {
  return (
    <tr className="es-row" aria-rowindex={props.index + 2}>
      {props.columns.map((column) => (
        <td
          key={column.key}
          className={classOf(column)}
        >
          {column.cell(props.row)}
        </td>
      ))}
    </tr>
  );
});
