import { Progress } from "@patternfly/react-core";
import type { ReactNode } from "react";

/** A bar with words. Not with PatternFly's own title, which screen readers do not get, and links in it nobody by keyboard. */
export function Bar(props: {
  title: ReactNode;
  label: string;
  told: string;
  fraction: number;
  variant?: "danger" | "warning" | "success" | undefined;
}): ReactNode {
  const { variant } = props;
  return (
    <div className="es-bar">
      <div className="es-meter">
        <span>{props.title}</span>
        <span className="es-muted">{props.told}</span>
      </div>
      <Progress
        aria-label={props.label}
        value={Math.min(1, Math.max(0, props.fraction)) * 100}
        valueText={props.told}
        measureLocation="none"
        size="sm"
        {...(variant === undefined ? {} : { variant })}
      />
    </div>
  );
}
