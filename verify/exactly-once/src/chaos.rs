//! Kills and crashes, spread over the run by what has been answered.

use std::sync::Arc;

use faults::cluster::Cluster;
use faults::process::{Launcher, Subject};
use faults::random::Random;
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use crate::Role;
use crate::options::Options;
use crate::traffic::Progress;

/// What falls, all of it without warning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    Server,
    Database,
    /// The server, while the database is down.
    Both,
    Consumer,
}

/// What has fallen.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Fallen {
    pub(crate) kills: usize,
    pub(crate) restarts: usize,
    pub(crate) consumer_kills: usize,
}

/// Kills of the consumer in a run.
pub(crate) fn consumer_kills(options: &Options) -> usize {
    1 + options.kills.max(options.restarts) / 3
}

/// All that can fall, running.
pub(crate) struct Site {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) launcher: Launcher,
    server: (Role, Option<Subject>),
    consumer: (Role, Option<Subject>),
    fallen: Fallen,
}

impl Site {
    pub(crate) async fn start(
        cluster: Arc<Cluster>,
        launcher: Launcher,
        server: Role,
        consumer: Role,
    ) -> Self {
        let (first, second) = tokio::join!(launcher.start(&server), launcher.start(&consumer));
        Self {
            cluster,
            launcher,
            server: (server, Some(first)),
            consumer: (consumer, Some(second)),
            fallen: Fallen::default(),
        }
    }

    /// Strikes as planned, until all is done or the clients have given up.
    pub(crate) async fn strike(
        &mut self,
        options: &Options,
        mut progress: watch::Receiver<Progress>,
    ) -> Fallen {
        for (after, blow) in plan(options) {
            let reached = progress.wait_for(|now| now.answered >= after || now.given_up);
            let now = *reached.await.expect("there are clients");
            if now.given_up {
                break;
            }
            eprintln!("{} of {}: {blow:?}", now.answered, options.operations);
            match blow {
                Blow::Server => self.kill_server().await,
                Blow::Database => self.crash(false).await,
                Blow::Both => self.crash(true).await,
                Blow::Consumer => {
                    kill(&mut self.consumer.1).await;
                    self.fallen.consumer_kills += 1;
                    self.consumer.1 = Some(self.launcher.start(&self.consumer.0).await);
                }
            }
        }
        self.fallen
    }

    async fn kill_server(&mut self) {
        kill(&mut self.server.1).await;
        self.fallen.kills += 1;
        self.server.1 = Some(self.launcher.start(&self.server.0).await);
    }

    async fn crash(&mut self, with_server: bool) {
        let cluster = self.cluster.clone();
        let shut = spawn_blocking(move || cluster.shut("immediate"));
        shut.await.expect("the database can be stopped");
        let cluster = self.cluster.clone();
        let boot = async {
            let boot = spawn_blocking(move || cluster.boot());
            boot.await.expect("the database starts again");
        };
        if with_server {
            tokio::join!(self.kill_server(), boot);
        } else {
            boot.await;
        }
        self.fallen.restarts += 1;
    }
}

async fn kill(subject: &mut Option<Subject>) {
    let subject = subject.take().expect("it is running");
    let killed = spawn_blocking(move || subject.kill());
    killed.await.expect("it was running");
}

/// After how many answers which blow falls.
fn plan(options: &Options) -> Vec<(usize, Blow)> {
    let mut random = Random::from_seed(options.seed);
    let both = options.kills.min(options.restarts) / 3;
    let mut blows = vec![Blow::Server; options.kills - both];
    blows.resize(options.kills, Blow::Both);
    blows.resize(blows.len() + options.restarts - both, Blow::Database);
    blows.resize(blows.len() + consumer_kills(options), Blow::Consumer);
    let step = options.operations / (blows.len() + 1);
    let mut planned = Vec::new();
    while !blows.is_empty() {
        let blow = blows.swap_remove(below(&mut random, blows.len()));
        let after = step * (planned.len() + 1) + below(&mut random, step);
        planned.push((after, blow));
    }
    planned
}

fn below(random: &mut Random, end: usize) -> usize {
    usize::try_from(random.below(end as u64)).expect("it is below a usize")
}
