import { address, request } from "./client";

/** One server-sent event; `data` is its JSON. */
export interface ServerEvent {
  kind: string;
  id: string | null;
  data: Readonly<Record<string, unknown>>;
}

/**
 * Server-sent events, read from a fetch: the browser's own EventSource cannot send a token in a header, and a token in an
 * address ends up in logs.
 */
export async function* follow(
  client: string | undefined,
  since: string | null,
  signal: AbortSignal,
): AsyncGenerator<ServerEvent> {
  const headers = since === null ? undefined : { "Last-Event-ID": since };
  const response = await request(address("events", { client_uid: client }), { headers, signal });
  if (response.body === null) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop() ?? "";
      for (const block of blocks) {
        const event = parse(block);
        if (event !== null) yield event;
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

export function parse(block: string): ServerEvent | null {
  let kind = "message";
  let id: string | null = null;
  const data: string[] = [];
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") kind = value;
    else if (field === "id") id = value;
    else if (field === "data") data.push(value);
  }
  if (data.length === 0) return null;
  return { kind, id, data: JSON.parse(data.join("\n")) as Record<string, unknown> };
}
