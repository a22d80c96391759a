import { Button, Form, Modal, ModalBody, ModalFooter, ModalHeader } from "@patternfly/react-core";
import { type ReactNode, useId, useState } from "react";
import { Alert } from "./Note";

/** A form in a dialog. `onSubmit` may take its time; what it throws is shown, and the dialog stays, as after "stay". */
export function Dialog(props: {
  title: string;
  description?: ReactNode;
  submit: string;
  isDanger?: boolean;
  isReady?: boolean;
  onSubmit: () => Promise<void | "stay">;
  onClose: () => void;
  children?: ReactNode;
}): ReactNode {
  const id = useId();
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<string | null>(null);
  const submit = async (): Promise<void> => {
    setBusy(true);
    setError(null);
    try {
      if ((await props.onSubmit()) !== "stay") props.onClose();
    } catch (problem) {
      setError(problem instanceof Error ? problem.message : String(problem));
      setBusy(false);
    }
  };
  return (
    <Modal isOpen variant="small" onClose={props.onClose} aria-labelledby={`${id}-title`}>
      <ModalHeader
        title={props.title}
        labelId={`${id}-title`}
        description={props.description}
        {...(props.isDanger ? { titleIconVariant: "warning" as const } : {})}
      />
      <ModalBody>
        <Form
          id={`${id}-form`}
          onSubmit={(event) => {
            event.preventDefault();
            if (!busy && props.isReady !== false) void submit();
          }}
        >
          {error !== null && <Alert variant="danger" title={error} aria-live="assertive" />}
          {props.children}
        </Form>
      </ModalBody>
      <ModalFooter>
        <Button
          type="submit"
          form={`${id}-form`}
          variant={props.isDanger ? "danger" : "primary"}
          isLoading={busy}
          isDisabled={busy || props.isReady === false}
        >
          {props.submit}
        </Button>
        <Button variant="link" onClick={props.onClose}>
          Cancel
        </Button>
      </ModalFooter>
    </Modal>
  );
}
