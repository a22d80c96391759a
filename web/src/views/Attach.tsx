import { Content, Tab, Tabs, TabTitleText } from "@patternfly/react-core";
import { type ReactNode, useState } from "react";
import type { Export } from "../api/types";
import { CopyBlock } from "../ui/CopyBlock";
import { commandLine } from "../ui/shell-words";
import { Alert } from "../ui/Note";

/** How a hypervisor attaches an export. */
export function Attach({ made }: { made: Export }): ReactNode {
  const [tab, setTab] = useState<string | number>("qemu");
  const endpoint = made.endpoint as Readonly<Record<string, unknown>>;
  const credentials = Object.entries(made.credentials as Readonly<Record<string, string>>);
  return (
    <div className="es-stack es-stack-tight">
      <Content component="p">
        It serves {made.readonly ? "read-only " : ""}over {made.protocol}. Paste one of these on the client’s host.
        {credentials.length > 0 && " They hold a secret: keep them where others cannot read them."}
      </Content>
      {made.prepare.length > 0 && <CopyBlock label="Before, in a shell" text={made.prepare.join("\n")} />}
      <Tabs activeKey={tab} onSelect={(_event, key) => setTab(key)} aria-label="Attach with">
        <Tab eventKey="qemu" title={<TabTitleText>QEMU</TabTitleText>}>
          <CopyBlock label="A virtual machine with this disk" text={commandLine("qemu-system-x86_64 -accel kvm -accel tcg -m 1G", made.qemu)} />
        </Tab>
        <Tab eventKey="libvirt" title={<TabTitleText>libvirt</TabTitleText>}>
          {made.libvirt === "" ? (
            <Alert variant="info" isPlain title="libvirt does not know this kind of export." />
          ) : (
            <CopyBlock label="For virsh attach-device, or inside <devices>" text={made.libvirt} />
          )}
        </Tab>
        <Tab eventKey="other" title={<TabTitleText>Address</TabTitleText>}>
          <div className="es-stack es-stack-tight">
            {typeof endpoint.uri === "string" && <CopyBlock label="URI" text={endpoint.uri} />}
            <CopyBlock
              label="Where it is"
              text={Object.entries(endpoint)
                .filter(([key]) => key !== "uri")
                .map(([key, value]) => `${key}: ${String(value)}`)
                .join("\n")}
            />
            {credentials.length > 0 && (
              <CopyBlock label="Credentials" text={credentials.map(([key, value]) => `${key}: ${value}`).join("\n")} />
            )}
          </div>
        </Tab>
      </Tabs>
    </div>
  );
}
