import { Alert, AlertActionCloseButton, AlertActionLink, AlertGroup } from "@patternfly/react-core";
import type { ReactNode } from "react";
import { useStore } from "../state/store";
import { dismiss, toasts } from "../state/toasts";

export function Toasts(): ReactNode {
  const shown = useStore(toasts);
  return (
    <AlertGroup isToast isLiveRegion aria-label="Notices">
      {shown.map((one) => (
        <Alert
          component="p"
          key={one.id}
          variant={one.variant}
          title={one.title}
          actionClose={<AlertActionCloseButton onClose={() => dismiss(one.id)} />}
          actionLinks={
            one.action && (
              <AlertActionLink
                onClick={() => {
                  one.action?.run();
                  dismiss(one.id);
                }}
              >
                {one.action.label}
              </AlertActionLink>
            )
          }
        >
          {one.detail}
        </Alert>
      ))}
    </AlertGroup>
  );
}
