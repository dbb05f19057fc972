// What is open in this tab, and how it is shown.
"use strict";

/**
 * @typedef {{conversation: Conversation, message: Message, stopper: AbortController}} Generation
 * An answer that is being written. There is one at a time; it goes on while another conversation is shown.
 */

const WIDE = "(min-width: 52rem)";

const page = {
  store: new ConversationStore(),
  settings: loadSettings(),
  announcer: new Announcer(byId("announcer", HTMLElement)),
  /** What is shown. */
  conversation: newConversation(""),
  /** @type {MessageView[]} of the conversation that is shown */
  views: [],
  /** @type {Generation | null} */
  generation: null,
  /** Whether the server keeps states, as far as known: where it refuses to, turns send the whole conversation. */
  hasStates: true,
};

/** @param {string} text an error outside any message; empty to take it away */
function notice(text) {
  byId("notice", HTMLElement).textContent = text;
}

/** @param {unknown} error */
function inWords(error) {
  return error instanceof Error ? error.message : String(error);
}

/** @param {Conversation} conversation */
function show(conversation) {
  page.conversation = conversation;
  page.settings.current = conversation.id;
  saveSettings(page.settings);
  byId("title", HTMLElement).textContent = conversation.title;
  document.title = conversation.title;
  byId("system", HTMLTextAreaElement).value = conversation.system;
  page.views = conversation.messages.map((message) => new MessageView(message, page.settings.probabilities));
  const hint = conversation.root === null ? [] : [element("p", { className: "hint" }, "Goes on from a state file.")];
  messagesNode().replaceChildren(...hint, ...page.views.map((view) => view.node));
  showActions();
  showList();
  messagesNode().scrollTop = messagesNode().scrollHeight;
}

function messagesNode() {
  return byId("messages", HTMLElement);
}

function showList() {
  const rows = page.store.list().map((conversation) => {
    const open = element("button", { type: "button", className: "open" }, conversation.title);
    open.onclick = () => choose(conversation);
    if (conversation === page.conversation) open.setAttribute("aria-current", "true");
    const remove = element("button", { type: "button", className: "icon" }, "×");
    remove.setAttribute("aria-label", `Delete ${conversation.title}`);
    remove.onclick = () => removeConversation(conversation);
    return element("li", {}, open, remove);
  });
  byId("conversations", HTMLElement).replaceChildren(...rows);
}

/** What can be done with each message, which of Send and Stop is there, and whether the past may change. */
function showActions() {
  const isBusy = page.generation !== null;
  const isFixed = page.conversation.root !== null || page.generation?.conversation === page.conversation;
  byId("system", HTMLTextAreaElement).disabled = isFixed;
  const stop = byId("stop", HTMLButtonElement);
  const hadFocus = document.activeElement === stop;
  byId("send", HTMLButtonElement).hidden = isBusy;
  stop.hidden = !isBusy;
  if (hadFocus && !isBusy) byId("prompt", HTMLElement).focus();
  page.views.forEach((view, i) => view.setActions(isBusy ? [] : actionsOf(view.message, i)));
}

/**
 * @param {Message} message
 * @param {number} i
 * @returns {[string, () => void][]}
 */
function actionsOf(message, i) {
  const { conversation } = page;
  if (message.role === "user") return [["Edit in a fork", () => edit(conversation, i)]];
  /** @type {[string, () => void][]} */
  const actions = [];
  if (navigator.clipboard) actions.push(["Copy", () => navigator.clipboard.writeText(message.content)]);
  if (i === conversation.messages.length - 1) actions.push(["Regenerate", () => regenerate(conversation)]);
  if (message.content) actions.push(["Fork", () => fork(conversation, i + 1)]);
  const { state } = message;
  if (state !== null) actions.push(["Save state", () => saveState(conversation, state)]);
  return actions;
}

/** @param {Conversation} conversation */
function choose(conversation) {
  notice("");
  show(conversation);
  if (!matchMedia(WIDE).matches) closePanel("sidebar", "toggle-sidebar");
  byId("prompt", HTMLElement).focus();
}
