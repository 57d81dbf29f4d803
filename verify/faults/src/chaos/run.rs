//! One run, from the first process to the last line.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::task::{JoinHandle, JoinSet};
use tower_idempotency::PgStore;

use super::audit;
use super::checker::Logged;
use super::counts::Class;
use super::inject::{Place, crash};
use super::load::{Client, Phase, World, send_brief};
use super::options::{Options, Plant};
use super::plan::Route;
use super::service::{EXECUTION_LIMIT, LEASE, Settings, TABLE, TRANSACTIONS};
use crate::client::Connection;
use crate::cluster::Cluster;
use crate::process::Launcher;

/// Processes of the service.
pub const SUBJECTS: usize = 3;

/// Whether all was well. The last two lines that it prints say what there was.
///
/// # Panics
///
/// When what it needs is not there.
pub async fn run(options: Options, launcher: Launcher) -> bool {
    eprintln!("seed {}, {} minutes", options.seed, options.minutes);
    let run = Run::start(options, launcher).await;
    run.go_through().await
}

struct Run {
    world: Arc<World>,
    cluster: Arc<Cluster>,
    pool: PgPool,
    places: Vec<Place>,
    logged: Arc<Mutex<Logged>>,
}

impl Run {
    async fn start(options: Options, launcher: Launcher) -> Self {
        let cluster = Arc::new(Cluster::start().await);
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .connect_lazy(&cluster.url())
            .expect("the URL is one");
        let store = PgStore::new(pool.clone());
        store.migrate().await.expect("the schema can be made");
        store.close().await;
        let created = sqlx::query(TABLE).execute(&pool).await;
        created.expect("the table can be made");
        let logged = Arc::new(Mutex::new(Logged::default()));
        let settings = Settings {
            store: cluster.url(),
            effects: cluster.url(),
            doubles_effects: options.plant == Some(Plant::DoubleEffect),
        };
        let world = World::new(options, SUBJECTS);
        let mut places = Vec::new();
        for number in 0..SUBJECTS {
            places.push(Place::start(number, &world, launcher, &settings, &logged).await);
        }
        Self {
            world,
            cluster,
            pool,
            places,
            logged,
        }
    }

    async fn go_through(mut self) -> bool {
        let mut clients = self.send();
        let safety = self.suffer();
        let waited = self.until_time_is_over().await;
        // What was stopped goes on, and what was killed is started again: from then on time counts.
        let deadline = Instant::now() + Duration::from_secs(600);
        self.world.phase.send_replace(Phase::Heal(deadline));
        self.places = safety.end().await;
        for place in &self.places {
            place.proxy.heal();
            // What fell silent is never heard of again; where a host is gone, its kernel says so.
            place.proxy.cut();
        }
        let deadline = Instant::now() + LEASE + Duration::from_secs(5);
        self.world.phase.send_replace(Phase::Heal(deadline));
        while let Some(ended) = clients.join_next().await {
            ended.expect("clients do not panic");
        }
        let took =
            (LEASE + Duration::from_secs(5)) - deadline.saturating_duration_since(Instant::now());
        eprintln!(
            "all was at its end {} ms after the faults",
            took.as_millis()
        );
        self.replay().await;
        self.check_pools().await;
        self.finish().await;
        self.tell(waited)
    }

    fn send(&self) -> JoinSet<()> {
        let mut clients = JoinSet::new();
        for number in 0..self.world.options.clients {
            clients.spawn(Client::new(&self.world, number).run());
        }
        clients.spawn(send_brief(self.world.clone()));
        clients
    }

    fn suffer(&mut self) -> Safety {
        let world = &self.world;
        let places = std::mem::take(&mut self.places).into_iter();
        let places = places.map(|place| tokio::spawn(place.suffer(world.phase.subscribe())));
        let server = crash(
            world.clone(),
            self.cluster.clone(),
            self.pool.clone(),
            world.phase.subscribe(),
        );
        let planting = world.options.plant.map(|plant| {
            let pool = self.pool.clone();
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    // Now and then the server is down.
                    let _ = audit::plant(plant, &pool).await;
                }
            })
        });
        Safety {
            places: places.collect(),
            server: tokio::spawn(server),
            planting,
        }
    }

    /// Whether as much was sent as was asked for.
    async fn until_time_is_over(&self) -> bool {
        let options = &self.world.options;
        let time = Duration::from_secs_f64(60.0 * options.minutes);
        let (start, mut told) = (Instant::now(), Instant::now());
        loop {
            let sends = self.world.totals.sends.load(Ordering::Relaxed);
            let is_enough = sends >= options.sends as u64;
            let elapsed = start.elapsed();
            if elapsed >= time && (is_enough || elapsed >= 2 * time) {
                eprintln!(
                    "{:.0} requests a second",
                    sends as f64 / elapsed.as_secs_f64()
                );
                return is_enough;
            }
            if told.elapsed() > Duration::from_secs(60) {
                told = Instant::now();
                let violations = self.world.violations().1;
                eprintln!(
                    "{} s: {sends} sent, {violations} violations",
                    elapsed.as_secs()
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The last duplicates.
    async fn replay(&self) {
        let waiting = Arc::new(Mutex::new(self.world.waiting()));
        let mut clients = JoinSet::new();
        for number in 0..4 {
            clients.spawn(Client::new(&self.world, number).replay(waiting.clone()));
        }
        while let Some(ended) = clients.join_next().await {
            ended.expect("clients do not panic");
        }
    }

    /// Invariant I-11, of the subjects: as many transactions at once as ever.
    async fn check_pools(&self) {
        let delay = EXECUTION_LIMIT * 3 / 4;
        for (number, target) in self.world.targets.iter().enumerate() {
            let port = target.port.load(Ordering::Relaxed);
            let mut times = Vec::new();
            // The first time opens connections.
            for round in 0..4 {
                let started = Instant::now();
                let requests = (0..TRANSACTIONS).map(|nth| {
                    let key = format!("pool-{number}-{round}-{nth}");
                    transaction(port, key, delay)
                });
                let answers = futures_util::future::join_all(requests).await;
                let took = started.elapsed();
                times.push((took, answers.iter().filter(|ok| **ok).count()));
                if took < delay * 2 && answers.iter().all(|ok| *ok) {
                    times.clear();
                    break;
                }
            }
            if !times.is_empty() {
                let text =
                    format!("I-11: {TRANSACTIONS} transactions at once on {number}: {times:?}");
                self.world.violated(text);
            }
        }
    }

    async fn finish(&mut self) {
        for place in &self.places {
            let accounts = place.accounts().await;
            if let Some(violation) = super::checker::accounts(&accounts) {
                self.world.violated(violation);
            }
        }
        audit::hygiene(&self.world, &self.pool).await;
        for place in self.places.drain(..) {
            place.finish().await;
        }
        let logged = std::mem::take(&mut *self.logged.lock().expect("no panic holds it"));
        audit::count_faults(&self.world, &self.pool).await;
        audit::compare(&self.world, &self.pool, &logged).await;
    }

    fn tell(&self, is_enough: bool) -> bool {
        let world = &self.world;
        let (violations, count) = world.violations();
        for violation in &violations {
            println!("violation: {violation}");
        }
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let totals = &world.totals;
        let (sends, answered) = (get(&totals.sends), get(&totals.answered));
        let missing = world.counts.missing();
        if !missing.is_empty() {
            println!("faults that never were: {}", missing.join(" "));
        }
        let is_half = 2 * answered >= sends;
        if !is_half {
            println!("less than half of the requests were answered");
        }
        if !is_enough {
            println!("fewer requests than {}", world.options.sends);
        }
        println!("{}", world.counts);
        println!(
            "sends {sends} answered {answered} replayed {} unknown {} kills {} restarts {} \
             operations {} violations {count} seed {}",
            get(&totals.replayed),
            get(&totals.unknown),
            world.counts.get(Class::Kill),
            world.counts.get(Class::Restart),
            get(&totals.operations),
            world.options.seed,
        );
        count == 0 && missing.is_empty() && is_half && is_enough
    }
}

/// What makes the faults.
struct Safety {
    places: Vec<JoinHandle<Place>>,
    server: JoinHandle<()>,
    planting: Option<JoinHandle<()>>,
}

impl Safety {
    /// Waits for what is under way.
    async fn end(self) -> Vec<Place> {
        if let Some(planting) = self.planting {
            planting.abort();
        }
        self.server.await.expect("the server is up again");
        let mut places = Vec::new();
        for place in self.places {
            places.push(place.await.expect("the subject is up again"));
        }
        places
    }
}

/// Whether it was answered.
async fn transaction(port: u16, key: String, delay: Duration) -> bool {
    let body = r#"{"operation":0,"amount":0}"#;
    let request = format!(
        "POST {} HTTP/1.1\r\nhost: subject\r\nconnection: close\r\nidempotency-key: {key}\r\n\
         x-tenant: acme\r\nx-send: -1\r\nx-behave: delay={}\r\ncontent-length: {}\r\n\r\n{body}",
        Route::Transactional.path(),
        delay.as_millis(),
        body.len()
    );
    let exchange = async {
        let mut connection = Connection::open(port).await?;
        connection.write(request.as_bytes()).await?;
        connection.answer().await
    };
    exchange.await.is_ok_and(|answer| answer.status == 201)
}
