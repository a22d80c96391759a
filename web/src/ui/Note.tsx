import { Alert as PatternFlyAlert, type AlertProps } from "@patternfly/react-core";
import type { ReactNode } from "react";

/** PatternFly's alert inside a view. Its title is no heading: where it stands, one of its level would be out of order. */
export function Alert(props: Omit<AlertProps, "isInline" | "component">): ReactNode {
  return <PatternFlyAlert {...props} isInline component="p" />;
}
