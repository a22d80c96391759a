import type { Answer, Body, CallName, Job } from "./types";

const BASE = "/api/v1.0/";

/** What the server said instead of an answer. `message` is its sentence. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code: string,
    readonly details: Readonly<Record<string, unknown>> = {},
  ) {
    super(message);
  }
}

let token: string | null = null;
let onRefused: () => void = () => undefined;

/** The token of all further requests, and what to do when the server takes it no longer. */
export function authenticate(text: string | null, refused: () => void): void {
  token = text;
  onRefused = refused;
}

export function authorization(): Record<string, string> {
  return token === null ? {} : { Authorization: `Bearer ${token}` };
}

export function address(path: string, query: Record<string, string | undefined> = {}): string {
  const given = Object.entries(query).filter((entry): entry is [string, string] => entry[1] !== undefined);
  return BASE + path + (given.length ? `?${new URLSearchParams(given).toString()}` : "");
}

/** A request with the token. Throws ApiError for every answer that is none of success. */
export async function request(path: string, init: RequestInit = {}): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, {
      ...init,
      headers: { ...authorization(), ...(init.headers as Record<string, string> | undefined) },
      credentials: "omit",
      cache: "no-store",
    });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it running, and is the network there?", 0, "unreachable");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response: Response): Promise<ApiError> {
  const said: unknown = await response.json().catch(() => null);
  const details = typeof said === "object" && said !== null ? (said as Record<string, unknown>) : {};
  const sentence = typeof details.error === "string" ? details.error : `the server answered ${response.status}`;
  const code = typeof details.code === "string" ? details.code : "unknown";
  const error = new ApiError(sentence.charAt(0).toUpperCase() + sentence.slice(1), response.status, code, details);
  if (response.status === 401 && token !== null) onRefused();
  return error;
}

function post(name: string, body: unknown, headers: Record<string, string>): Promise<Response> {
  return request(BASE + name, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", ...headers },
  });
}

/** Make a call and wait for its answer. */
export async function call<N extends CallName>(name: N, body: Body<N>): Promise<Answer<N>> {
  return (await (await post(name, body, {})).json()) as Answer<N>;
}

/** Begin a long call. Answers its job's id, or what the call answers when it was over at once. */
export async function begin<N extends CallName>(name: N, body: Body<N>): Promise<string | Answer<N>> {
  const response = await post(name, body, { Prefer: "respond-async" });
  const answer: unknown = await response.json();
  return response.status === 202 ? (answer as { job: string }).job : (answer as Answer<N>);
}

export async function getJob(id: string, client: string | undefined): Promise<Job> {
  return (await (await request(address(`jobs/${id}`, { client_uid: client }))).json()) as Job;
}

export async function cancelJob(id: string, client: string | undefined): Promise<void> {
  await request(address(`jobs/${id}`, { client_uid: client }), { method: "DELETE" });
}

/** The volumes a client sees, locked ones included, page by page: a long list is shown while it still arrives. */
export async function* listVolumes(client: string): AsyncGenerator<Answer<"accessible">> {
  let cursor: string | undefined;
  do {
    const response = await request(
      address("accessible", { client_uid: client, include_locked: "true", limit: "10000", cursor }),
    );
    yield (await response.json()) as Answer<"accessible">;
    cursor = response.headers.get("X-Next-Cursor") ?? undefined;
  } while (cursor !== undefined);
}
