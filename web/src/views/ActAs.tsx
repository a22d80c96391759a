import { Button, Form, FormGroup, Modal, ModalBody, ModalFooter, ModalHeader, TextInput } from "@patternfly/react-core";
import { type ReactNode, useState } from "react";
import { actAs, normaliseUid } from "../state/session";
import { useStore } from "../state/store";
import { volumes } from "../state/volumes";

/** An administrator looks at the page as one of the clients would. */
export function ActAs({ acting, onClose }: { acting: string | null; onClose: () => void }): ReactNode {
  const [text, setText] = useState(acting ?? "");
  const owners = [...new Set([...useStore(volumes).byId.values()].map((volume) => volume.creatorID))].slice(0, 50);
  const uid = normaliseUid(text);
  const take = (): void => {
    if (uid === null) return;
    actAs(uid);
    onClose();
  };
  return (
    <Modal isOpen variant="small" onClose={onClose} aria-labelledby="act-as-title">
      <ModalHeader
        title="Act as a client"
        labelId="act-as-title"
        description="You see what this client sees, and what you make belongs to it."
      />
      <ModalBody>
        <Form
          id="act-as"
          onSubmit={(event) => {
            event.preventDefault();
            take();
          }}
        >
          <FormGroup label="Client, 32 hex digits" fieldId="act-as-uid" isRequired>
            <TextInput
              id="act-as-uid"
              list="owners"
              value={text}
              spellCheck={false}
              onChange={(_event, value) => setText(value)}
            />
            <datalist id="owners">
              {owners.map((owner) => (
                <option key={owner} value={owner} />
              ))}
            </datalist>
          </FormGroup>
        </Form>
      </ModalBody>
      <ModalFooter>
        <Button type="submit" form="act-as" isDisabled={uid === null}>
          Act as this client
        </Button>
        <Button variant="link" onClick={onClose}>
          Cancel
        </Button>
      </ModalFooter>
    </Modal>
  );
}
