import { Button, Content, Modal, ModalBody, ModalFooter, ModalHeader } from "@patternfly/react-core";
import { type ReactNode, useState } from "react";
import { address } from "../../api/client";
import type { Volume } from "../../api/types";
import { clientOf, type Session } from "../../state/session";
import { CopyBlock } from "../../ui/CopyBlock";
import { SelectField } from "../../ui/fields";
import { quote } from "../../ui/shell-words";

const FORMATS = [
  ["qcow2", "qcow2: small, holes take no room"],
  ["raw", "raw: the disk's bytes"],
  ["vmdk", "vmdk: for VMware"],
] as const;

/**
 * Where the server trusts the machine the browser fetches it by itself. A browser sends no token with a download, and one
 * in the address would be in logs: then there is a command.
 */
export function DownloadVolume(props: { volume: Volume; session: Session; onClose: () => void }): ReactNode {
  const { volume, session, onClose } = props;
  const [format, setFormat] = useState<"qcow2" | "raw" | "vmdk">(volume.format === "iso" ? "raw" : "qcow2");
  const path = address(`volumes/${volume.volumeID}/data`, { format, client_uid: clientOf(session) });
  const needsToken = session.who.client !== null;
  const ending = volume.format === "iso" ? "iso" : format === "raw" ? "img" : format;
  const file = `${volume.name.replace(/[^\w.-]+/g, "_") || volume.volumeID}.${ending}`;
  const header = needsToken ? ' -H "Authorization: Bearer $TOKEN"' : "";
  return (
    <Modal isOpen variant="small" onClose={onClose} aria-labelledby="download-title">
      <ModalHeader title={`Download ${volume.name}`} labelId="download-title" />
      <ModalBody>
        <div className="es-stack es-stack-tight">
          {volume.exported && !volume.readonly && (
            <Content component="p">It is exported: its guest may be writing, so it cannot be downloaded now.</Content>
          )}
          {volume.format !== "iso" && (
            <SelectField id="format" label="As" value={format} onChange={setFormat} options={FORMATS} />
          )}
          <CopyBlock
            label="In a shell; it goes on where it stopped when it is run again"
            text={`curl -C - -o ${quote(file)}${header} ${quote(window.location.origin + path)}`}
          />
        </div>
      </ModalBody>
      <ModalFooter>
        {!needsToken && (
          <Button component="a" href={path} download={file} onClick={onClose}>
            Download
          </Button>
        )}
        <Button variant={needsToken ? "primary" : "link"} onClick={onClose}>
          Close
        </Button>
      </ModalFooter>
    </Modal>
  );
}
