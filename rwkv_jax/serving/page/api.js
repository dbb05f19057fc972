// The server's endpoints, and its errors in words. Addresses are relative: a proxy may serve the page in a folder.
"use strict";

/** An answer of the server that is an error; `message` is meant for the reader. */
class ServerError extends Error {
  /**
   * @param {number} status 0 if there was no answer
   * @param {string} message
   * @param {string | null} [param] the field of the request that is wrong
   */
  constructor(status, message, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/**
 * @param {string} path
 * @param {RequestInit} [options]
 * @returns {Promise<Response>} of a status in 200 to 299
 */
async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  if (apiKey.get()) headers.set("Authorization", `Bearer ${apiKey.get()}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError(0, "The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

/**
 * @param {Response} response
 * @returns {Promise<ServerError>}
 */
async function errorOf(response) {
  const body = await response.json().catch(() => null);
  const said = String(body?.error?.message ?? `The server answered ${response.status}.`);
  const seconds = response.headers.get("Retry-After");
  const remedies = new Map([
    [401, "Enter an API key in the settings."],
    [429, `Try again ${seconds ? `in ${seconds} s` : "later"}.`],
    [503, "The server is starting or shutting down: try again later."],
  ]);
  const remedy = remedies.get(response.status);
  return new ServerError(response.status, remedy ? `${said} ${remedy}` : said, body?.error?.param);
}

/** @returns {Promise<string[]>} names of the server's models */
async function fetchModels() {
  const { data } = await (await ask("v1/models")).json();
  return data.map((/** @type {{id: string}} */ model) => model.id);
}

/**
 * Chunks of an answer.
 * @param {object} body of a chat completion
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<any>}
 */
async function* streamChat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of serverSentEvents(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(response.status, chunk.error.message, chunk.error.param);
    yield chunk;
  }
  throw new ServerError(0, "The connection was lost before the end of the answer.");
}

/**
 * The data of each event of a stream (https://html.spec.whatwg.org/multipage/server-sent-events.html).
 * @param {Response} response
 * @returns {AsyncGenerator<string>}
 */
async function* serverSentEvents(response) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  while (true) {
    const { value, done } = await readPart(reader);
    if (done) return;
    const events = (rest + decoder.decode(value, { stream: true })).split(/\r\n\r\n|\n\n|\r\r/);
    rest = events.pop() ?? "";
    for (const event of events) {
      const lines = event.split(/\r\n|\n|\r/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    }
  }
}

/** @param {ReadableStreamDefaultReader<Uint8Array>} reader */
async function readPart(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ServerError(0, "The connection was lost before the end of the answer.");
  }
}

/**
 * @param {string} id
 * @returns {Promise<Blob>} the state's file
 */
async function fetchState(id) {
  return (await ask(`v1/states/${encodeURIComponent(id)}`)).blob();
}

/**
 * Gives the server a state file.
 * @param {string} id
 * @param {Blob} file
 */
async function putState(id, file) {
  const headers = { "Content-Type": "application/octet-stream" };
  await ask(`v1/states/${encodeURIComponent(id)}`, { method: "PUT", headers, body: file });
}

/**
 * Deletes states that nobody needs. One that is left ends by its age.
 * @param {string[]} ids
 */
async function deleteStates(ids) {
  await Promise.allSettled(ids.map((id) => ask(`v1/states/${encodeURIComponent(id)}`, { method: "DELETE" })));
}
