import type { ReactNode } from "react";

export function Brand(): ReactNode {
  return (
    <span className="es-brand">
      <img src="/favicon.svg" alt="" width={28} height={28} />
      <span>Elemento Storage</span>
    </span>
  );
}
