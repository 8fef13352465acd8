//! `serve` as its clients meet it, over plain HTTP.

mod common;
#[path = "common/models.rs"]
mod models;
#[path = "common/server.rs"]
mod server;

#[path = "serve/answers.rs"]
mod answers;
#[path = "serve/clients.rs"]
mod clients;
#[path = "serve/ending.rs"]
mod ending;
#[path = "serve/page.rs"]
mod page;
#[path = "serve/refusals.rs"]
mod refusals;
#[path = "serve/room.rs"]
mod room;
