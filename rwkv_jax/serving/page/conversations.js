// Conversations as data: what a turn asks the server, and how a fork begins. Nothing here touches the document.
//
// Each answer comes with the id of the state after it, which the server keeps. The next turn names the newest such
// state and sends only the messages after it, so a turn costs the same however long the conversation is, and a fork,
// which begins with the state of an earlier answer, costs nothing.
"use strict";

/** The marker behind a model's thoughts. */
const THINK_END = "</think>";

/**
 * @typedef {{text: string, logprob: number, alternatives: {text: string, logprob: number}[]}} Token
 * @typedef {{numTokens: number | null, seconds: number, firstToken: number | null}} Timing
 *   `seconds` from the first token to the last, `firstToken` from the request to the first, both in seconds.
 * @typedef {{
 *   role: "user" | "assistant",
 *   content: string,
 *   reasoning: string,
 *   tokens: Token[],
 *   state: string | null,
 *   finish: string | null,
 *   error: string,
 *   timing: Timing | null,
 * }} Message
 *   `state` is the id of the state after an answer. `finish` is null while the answer is being written.
 * @typedef {{
 *   id: string,
 *   title: string,
 *   updated: number,
 *   system: string,
 *   root: string | null,
 *   messages: Message[],
 * }} Conversation
 *   `root` is the id of the state that the first message follows, of a conversation that began with a state file.
 */

/** 128 random bits; crypto.randomUUID is not there over plain HTTP. */
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * @param {string} system
 * @returns {Conversation}
 */
function newConversation(system) {
  return { id: newId(), title: "New conversation", updated: Date.now(), system, root: null, messages: [] };
}

/**
 * @param {"user" | "assistant"} role
 * @param {string} content
 * @returns {Message}
 */
function newMessage(role, content) {
  const finish = role === "user" ? "stop" : null;
  return { role, content, reasoning: "", tokens: [], state: null, finish, error: "", timing: null };
}

/**
 * A conversation with the same messages before `end`, and their states.
 * @param {Conversation} conversation
 * @param {number} end
 * @returns {Conversation}
 */
function forkConversation(conversation, end) {
  const fork = structuredClone({ ...conversation, messages: conversation.messages.slice(0, end) });
  const title = conversation.title.replace(/ \(fork\)$/, "");
  return { ...fork, id: newId(), title: `${title} (fork)`, updated: Date.now() };
}

/**
 * The fields of a request for the answer `messages[end]`: a state, and the messages that it has not read.
 * @param {Conversation} conversation
 * @param {number} end
 * @returns {{state?: string, messages: {role: string, content: string, reasoning_content?: string}[]}}
 */
function turnOf(conversation, end) {
  const before = conversation.messages.slice(0, end);
  const newest = before.findLastIndex((message) => message.state !== null);
  const state = newest < 0 ? conversation.root : before[newest].state;
  const unread = withoutFailedTurns(before.slice(newest + 1)).map(({ role, content, reasoning }) =>
    reasoning ? { role, content, reasoning_content: reasoning } : { role, content },
  );
  if (state !== null) return { state, messages: unread };
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  return { messages: [...system, ...unread] };
}

/**
 * Leaves out questions whose answer failed or was stopped before its first word.
 * @param {Message[]} messages
 */
function withoutFailedTurns(messages) {
  const failed = (/** @type {Message | undefined} */ message) => message?.role === "assistant" && !message.content;
  return messages.filter((message, i) => !failed(message) && !(message.role === "user" && failed(messages[i + 1])));
}

/**
 * Lets the next turn send the whole text, as after a change of the system prompt.
 * @param {Conversation} conversation
 */
function forgetStates(conversation) {
  for (const message of conversation.messages) message.state = null;
}

/**
 * @param {Conversation} conversation
 * @returns {string[]}
 */
function statesOf(conversation) {
  const ids = [conversation.root, ...conversation.messages.map((message) => message.state)];
  return ids.filter((id) => id !== null);
}

/**
 * The states of `ids` that none of the conversations uses: a fork shares its states with where it comes from.
 * @param {string[]} ids
 * @param {Iterable<Conversation>} conversations
 */
function unusedStates(ids, conversations) {
  const used = new Set([...conversations].flatMap(statesOf));
  return [...new Set(ids)].filter((id) => !used.has(id));
}

/** @param {string} text */
function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

/**
 * Adds what a chunk of a stream holds to the answer.
 * @param {Message} message
 * @param {any} chunk a chat.completion.chunk
 */
function addChunk(message, chunk) {
  message.state = chunk.state?.id ?? message.state;
  const choice = chunk.choices?.[0];
  if (choice) {
    message.reasoning += choice.delta?.reasoning_content ?? "";
    message.content += choice.delta?.content ?? "";
    message.finish = choice.finish_reason ?? message.finish;
    for (const token of choice.logprobs?.content ?? []) message.tokens.push(tokenOf(token, decoderOf(message)));
  }
}

/** @type {WeakMap<Message, TextDecoder>} */
const decoders = new WeakMap();

/**
 * A character may be spread over several tokens; it is the last one's.
 * @param {Message} message
 */
function decoderOf(message) {
  const decoder = decoders.get(message) ?? new TextDecoder();
  decoders.set(message, decoder);
  return decoder;
}

/**
 * @param {{token: string, bytes: number[], logprob: number, top_logprobs: {token: string, logprob: number}[]}} token
 * @param {TextDecoder} decoder
 * @returns {Token}
 */
function tokenOf({ token, bytes, logprob, top_logprobs }, decoder) {
  const text = decoder.decode(Uint8Array.from(bytes), { stream: true });
  const others = top_logprobs.filter((other) => other.token !== token);
  return { text, logprob, alternatives: others.map((other) => ({ text: other.token, logprob: other.logprob })) };
}

/**
 * The tokens of the answer alone: the server's are those of the whole reply, thinking and its markers among them.
 * @param {Message} message
 * @returns {Token[]}
 */
function answerTokens({ tokens, reasoning }) {
  if (!reasoning) return tokens;
  let newest = "";
  const end = tokens.findIndex((token) => {
    newest = (newest + token.text).slice(-THINK_END.length - token.text.length);
    return newest.includes(THINK_END);
  });
  return end < 0 ? [] : tokens.slice(end + 1);
}
