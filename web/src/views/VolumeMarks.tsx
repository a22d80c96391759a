import type { ReactNode } from "react";
import type { Volume } from "../api/types";

/** What is special about a volume, in words: small, as there are thousands of rows. */
export function marksOf(volume: Volume): readonly (readonly [kind: string, text: string])[] {
  const marks: (readonly [string, string])[] = [];
  if (volume.locked !== undefined) marks.push(["busy", volume.locked.purpose]);
  if (volume.exported) marks.push(["good", "exported"]);
  if (volume.waiting === true) marks.push(["warn", "no content yet"]);
  if (volume.private) marks.push(["plain", "private"]);
  if (volume.readonly && volume.format !== "iso") marks.push(["plain", "read-only"]);
  if (volume.linked === true) marks.push(["plain", "linked"]);
  return marks;
}

export function VolumeMarks({ volume }: { volume: Volume }): ReactNode {
  return marksOf(volume).map(([kind, text]) => (
    <span key={text} className={`es-mark es-mark-${kind}`}>
      {text}
    </span>
  ));
}
