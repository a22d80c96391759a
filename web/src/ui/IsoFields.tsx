import type { ReactNode } from "react";
import { SelectField, TextField } from "./fields";

/** What an ISO image holds. */
export interface IsoFacts {
  isotype: "os_generic" | "tool";
  os_family: string;
  os_flavour: string;
  os_version: string;
  tool_scope: string;
  tool_version: string;
}

export const NO_FACTS: IsoFacts = {
  isotype: "os_generic",
  os_family: "",
  os_flavour: "",
  os_version: "",
  tool_scope: "",
  tool_version: "",
};

export function areGood(facts: IsoFacts): boolean {
  return facts.os_family.trim() !== "";
}

/** The keys of `iso/create` that say something. */
export function isoKeys(facts: IsoFacts): { isotype: "os_generic" | "tool"; os_family: string } & Record<string, string> {
  const optional =
    facts.isotype === "tool"
      ? { tool_scope: facts.tool_scope.trim(), tool_version: facts.tool_version.trim() }
      : { os_flavour: facts.os_flavour.trim(), os_version: facts.os_version.trim() };
  const said = Object.fromEntries(Object.entries(optional).filter(([, value]) => value !== ""));
  return { ...said, isotype: facts.isotype, os_family: facts.os_family.trim() };
}

const TYPES = [
  ["os_generic", "A system: something to boot from"],
  ["tool", "A tool: drivers and the like"],
] as const;

export function IsoFields({ facts, onChange }: { facts: IsoFacts; onChange: (facts: IsoFacts) => void }): ReactNode {
  const set = (change: Partial<IsoFacts>): void => onChange({ ...facts, ...change });
  return (
    <>
      <SelectField id="isotype" label="Is" value={facts.isotype} onChange={(isotype) => set({ isotype })} options={TYPES} />
      <TextField
        id="family"
        label="System"
        isRequired
        value={facts.os_family}
        onChange={(os_family) => set({ os_family })}
        list={["linux", "windows", "bsd"]}
        help="Such as linux or windows."
      />
      {facts.isotype === "tool" ? (
        <>
          <TextField id="scope" label="What for" value={facts.tool_scope} onChange={(tool_scope) => set({ tool_scope })} placeholder="drivers" />
          <TextField id="version" label="Version" value={facts.tool_version} onChange={(tool_version) => set({ tool_version })} />
        </>
      ) : (
        <>
          <TextField id="flavour" label="Flavour" value={facts.os_flavour} onChange={(os_flavour) => set({ os_flavour })} placeholder="debian" />
          <TextField id="version" label="Version" value={facts.os_version} onChange={(os_version) => set({ os_version })} placeholder="12.10" />
        </>
      )}
    </>
  );
}
