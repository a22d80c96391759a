import { Button } from "@patternfly/react-core";
import { type ReactNode, useRef, useState } from "react";

/** Something to be pasted elsewhere: shown whole, and copied with one click. */
export function CopyBlock({ label, text }: { label: string; text: string }): ReactNode {
  const [copied, setCopied] = useState(false);
  const block = useRef<HTMLPreElement>(null);
  const copy = async (): Promise<void> => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without TLS a browser gives the clipboard to pages of this machine only: the old way still works.
      const range = document.createRange();
      if (block.current === null) return;
      range.selectNodeContents(block.current);
      const selection = window.getSelection();
      selection?.removeAllRanges();
      selection?.addRange(range);
      document.execCommand("copy");
    }
    setCopied(true);
    window.setTimeout(() => setCopied(false), 2000);
  };
  return (
    <figure className="es-copy">
      <figcaption>
        <span>{label}</span>
        <Button variant="link" isInline onClick={() => void copy()} aria-label={`Copy: ${label}`}>
          <span aria-live="polite">{copied ? "Copied" : "Copy"}</span>
        </Button>
      </figcaption>
      <pre ref={block} tabIndex={0} aria-label={label}>
        {text}
      </pre>
    </figure>
  );
}
