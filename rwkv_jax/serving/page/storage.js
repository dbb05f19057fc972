// What stays in the browser: conversations in IndexedDB, settings in localStorage, the API key in sessionStorage.
"use strict";

/** @returns {Promise<IDBDatabase>} */
function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("rwkv-chat", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/**
 * @template T
 * @param {IDBDatabase} database
 * @param {IDBTransactionMode} mode
 * @param {(store: IDBObjectStore) => IDBRequest<T>} ask
 * @returns {Promise<T>} once it is on the disk
 */
function inStore(database, mode, ask) {
  return new Promise((resolve, reject) => {
    const transaction = database.transaction("conversations", mode);
    const request = ask(transaction.objectStore("conversations"));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

/**
 * Conversations by id, in the database and here. Without a database, as in some private windows, only here.
 */
class ConversationStore {
  /** @type {Map<string, Conversation>} */
  conversations = new Map();
  /** @type {IDBDatabase | null} */
  database = null;

  /** Reads what is stored. @returns {Promise<boolean>} whether what follows will be stored */
  async open() {
    try {
      this.database = await openDatabase();
      const stored = await inStore(this.database, "readonly", (store) => store.getAll());
      this.conversations = new Map(stored.map((conversation) => [conversation.id, conversation]));
    } catch {
      this.database = null;
    }
    return this.database !== null;
  }

  /** Newest first. */
  list() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  /** @param {Conversation} conversation */
  async save(conversation) {
    this.conversations.set(conversation.id, conversation);
    if (this.database) await inStore(this.database, "readwrite", (store) => store.put(conversation));
  }

  /** @param {string} id */
  async remove(id) {
    this.conversations.delete(id);
    if (this.database) await inStore(this.database, "readwrite", (store) => store.delete(id));
  }
}

/**
 * @typedef {{
 *   system: string,
 *   thinking: string,
 *   sampling: Record<string, string>,
 *   probabilities: boolean,
 *   theme: "" | "dark" | "light",
 *   current: string,
 * }} Settings
 *   `sampling` has the fields as typed, `current` the id of the conversation that is shown.
 */

/** @returns {Settings} */
function loadSettings() {
  /** @type {Settings} */
  const defaults = { system: "", thinking: "", sampling: {}, probabilities: false, theme: "", current: "" };
  try {
    return { ...defaults, ...JSON.parse(localStorage.getItem("rwkv-chat") ?? "{}") };
  } catch {
    return defaults;
  }
}

/** @param {Settings} settings */
function saveSettings(settings) {
  try {
    localStorage.setItem("rwkv-chat", JSON.stringify(settings));
  } catch {
    // Storage is full or switched off: they hold until the page is closed.
  }
}

/** The API key, where the browser lets it be kept. */
const apiKey = {
  get() {
    try {
      return sessionStorage.getItem("rwkv-api-key") ?? this.unkept;
    } catch {
      return this.unkept;
    }
  },
  /** @param {string} key */
  set(key) {
    this.unkept = key;
    try {
      sessionStorage.setItem("rwkv-api-key", key);
    } catch {
      // It holds until the page is closed.
    }
  },
  unkept: "",
};
