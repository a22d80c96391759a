import { isMap, LineCounter, parseDocument, stringify } from "yaml";

/** Something about user-data: an error stops cloud-init from heeding it, a warning may be meant. */
export interface Finding {
  kind: "error" | "warning";
  line: number | null;
  text: string;
}

const KNOWN = new Set(
  (
    "allow_public_ssh_keys ansible apk_repos apt apt_pipelining bootcmd byobu_by_default ca_certs ca-certs chef chpasswd " +
    "cloud_config_modules cloud_final_modules cloud_init_modules create_hostname_file datasource device_aliases disable_ec2_metadata disable_root " +
    "disable_root_opts disk_setup fan final_message fqdn fs_setup groups growpart grub-dpkg grub_dpkg hostname keyboard " +
    "landscape locale locale_configfile lxd manage_etc_hosts manage_resolv_conf mcollective merge_how merge_type mounts " +
    "mount_default_fields network no_ssh_fingerprints ntp output package_reboot_if_required package_update package_upgrade " +
    "packages password phone_home power_state prefer_fqdn_over_hostname preserve_hostname puppet random_seed reporting " +
    "resize_rootfs resolv_conf rh_subscription rsyslog runcmd salt_minion snap spacewalk ssh ssh_authorized_keys " +
    "ssh_deletekeys ssh_fp_console_blacklist ssh_genkeytypes ssh_import_id ssh_keys ssh_publish_hostkeys ssh_pwauth " +
    "ssh_quiet_keygen swap system_info timezone ubuntu_advantage ubuntu_pro updates user users vendor_data version " +
    "wireguard write_files yum_repo_dir yum_repos zypper"
  ).split(" "),
);

/** What is wrong with user-data. Scripts and the like begin in another way, and are none of YAML. */
export function checkUserData(text: string): Finding[] {
  if (text.trim() === "") return [{ kind: "warning", line: null, text: "It is empty: cloud-init will do nothing." }];
  const first = text.split("\n", 1)[0] ?? "";
  if (/^(#!|#include|#cloud-boothook|#part-handler|## template: ?jinja|MIME-Version:|Content-Type:)/i.test(first)) return [];
  const findings = checkYaml(text);
  if (first.trimEnd() !== "#cloud-config") {
    findings.unshift({ kind: "error", line: 1, text: "The first line has to be #cloud-config, or #! of a script." });
  }
  return findings;
}

/** Whether a text is a YAML mapping. */
export function checkYaml(text: string, known: ReadonlySet<string> | null = KNOWN): Finding[] {
  const lines = new LineCounter();
  const document = parseDocument(text, { lineCounter: lines, prettyErrors: false });
  const findings: Finding[] = document.errors.map((error) => ({
    kind: "error",
    line: lines.linePos(error.pos[0]).line,
    text: error.message,
  }));
  if (findings.length > 0) return findings;
  const { contents } = document;
  if (contents !== null && !isMap(contents)) {
    return [{ kind: "error", line: null, text: "It has to be keys with values, such as hostname: web-1." }];
  }
  for (const { key } of contents?.items ?? []) {
    const name = String(key);
    if (known !== null && !known.has(name)) {
      const at = (key as { range?: readonly number[] }).range?.[0];
      const line = at === undefined ? null : lines.linePos(at).line;
      findings.push({ kind: "warning", line, text: `cloud-init knows no key ${name}.` });
    }
  }
  return findings;
}

export interface Wishes {
  hostname: string;
  user: string;
  sshKeys: string;
  packages: string;
}

/** User-data for the most common wishes. */
export function writeUserData(wishes: Wishes): string {
  const keys = wishes.sshKeys.split("\n").map((line) => line.trim()).filter(Boolean);
  const packages = wishes.packages.split(/[\s,]+/).filter(Boolean);
  const said = {
    ...(wishes.hostname === "" ? {} : { hostname: wishes.hostname, manage_etc_hosts: true }),
    ...(wishes.user === ""
      ? {}
      : {
          users: [
            {
              name: wishes.user,
              groups: "sudo",
              shell: "/bin/bash",
              sudo: "ALL=(ALL) NOPASSWD:ALL",
              ...(keys.length === 0 ? {} : { ssh_authorized_keys: keys }),
            },
          ],
        }),
    ...(packages.length === 0 ? {} : { package_update: true, packages }),
  };
  return `#cloud-config\n${Object.keys(said).length === 0 ? "" : stringify(said, { lineWidth: 0 })}`;
}
