//! Policies that flip a hundred times a second under connections that the kernel admits: of those that
//! begin and end while the agent has acknowledged that they are denied, not one is served.
//!
//! `FLIPS_SECONDS` is how long it goes on; an hour is millions of connections.

#![allow(clippy::unwrap_used)]

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert_lab::mesh::{Mesh, Running, ServiceSpec};
use culvert_lab::wait;
use culvert_proto::istio::security::string_match::MatchType;
use culvert_proto::istio::security::{Authorization, Clause, Match, Rule, StringMatch};
use culvert_tests::cluster::Cluster;
use culvert_tests::control::World;
use culvert_tests::direct::{Lateness, Stream, opened, straight_again, warm};
use culvert_tests::hunt::{Hunt, answer_one};
use culvert_tests::upgrade::{TAKE_OVER, wait_ended};
use culvert_tests::{connect, echo, serve};

const PORT: u16 = 8080;
/// Where connections are held open.
const HELD: u16 = 8081;
/// How long a policy stays, once it is acknowledged.
const WINDOW: Duration = Duration::from_millis(5);
/// Every so often it stays until what it denies has ended.
const REST_EVERY: u64 = 50;

fn no_client() -> Authorization {
    let client = MatchType::Exact("cluster.local/ns/web/sa/client".to_owned());
    let client = StringMatch { match_type: Some(client) };
    let is_client = Match { principals: vec![client], ..Match::default() };
    Authorization {
        name: "no-client".to_owned(),
        namespace: "shop".to_owned(),
        scope: 1,
        action: 1,
        rules: vec![Rule { clauses: vec![Clause { matches: vec![is_client] }] }],
        ..Authorization::default()
    }
}

/// Changes the policies, and waits until the agent has acknowledged it.
fn flip(world: &World, change: impl FnOnce(&World)) {
    let before = world.accepted();
    change(world);
    let limit = Instant::now() + wait::SOON;
    while world.accepted() == before {
        assert!(Instant::now() < limit, "not acknowledged");
        wait::pass(Duration::from_micros(100));
    }
}

/// The mesh, its control plane, and where something answers.
fn started() -> (Running, Arc<Cluster>, Vec<(IpAddr, u16)>) {
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("near", "shop", "near")
        .service(ServiceSpec::new("near", "shop").port(80, PORT).endpoint("near"))
        // The control plane is on the first node's address, which is one of its link to another.
        .node("b");
    let (mesh, cluster) = Cluster::start(mesh, false).unwrap();
    serve(&mesh, "near", PORT, answer_one).unwrap();
    let to = mesh.pod("near").addresses().map(|ip| (ip, PORT));
    let to = [to, mesh.service("near").map(|ip| (ip, 80))].concat();
    (mesh, cluster, to)
}

#[test]
fn nothing_is_served_that_is_known_to_be_denied() {
    let seconds = std::env::var("FLIPS_SECONDS").map_or(12, |text| text.parse().unwrap());
    let (mesh, cluster, to) = started();
    serve(&mesh, "near", HELD, echo).unwrap();
    let agent = cluster.culvert(&mesh, "a").unwrap();
    let held = (mesh.pod("near").addresses()[0], HELD);
    for to in to.iter().chain([&held]) {
        warm(&mesh, &agent, "client", *to).unwrap();
    }
    let world = cluster.plane(|plane| plane.world.clone()).unwrap();
    let policy = no_client();
    let hunt = Hunt::start(&mesh, "client", &to);
    let direct = opened(&agent).unwrap();
    let begun = Instant::now();
    let (mut flips, mut ended) = (0_u64, 0);
    while begun.elapsed() < Duration::from_secs(seconds) {
        let rests = flips % REST_EVERY == 0;
        let live = rests.then(|| {
            warm(&mesh, &agent, "client", held).unwrap();
            [(); 2].map(|()| Stream::start(&mesh, "client", held).unwrap())
        });
        flip(&world, |world| world.put_policy(&policy));
        hunt.denied();
        if let Some(live) = live {
            let over = || live.iter().all(Stream::is_finished);
            wait::until("the end of what is denied", wait::SOON, over).unwrap();
            ended += live.len();
            live.into_iter().for_each(|stream| assert!(stream.stop().is_err()));
        }
        wait::pass(WINDOW);
        hunt.undone();
        flip(&world, |world| world.remove_policy("shop/no-client"));
        wait::pass(WINDOW);
        flips += 2;
    }
    let tally = hunt.end();
    let direct = opened(&agent).unwrap() - direct;
    let late = Lateness::of(&agent).unwrap();
    let rate = flips as f64 / begun.elapsed().as_secs_f64();
    eprintln!("{flips} flips, {rate:.0} a second; {tally:?}, {direct} straight; {late:?}");
    assert_eq!(tally.served_though_denied, 0, "{tally:?}");
    // It was a hunt.
    assert!(flips >= 20 && tally.denied >= 50 && tally.served >= 50, "{flips} flips, {tally:?}");
    assert!(direct >= 50.0, "{direct} went straight");
    assert!(late.count >= ended as f64 && late.within_a_second >= late.count * 0.9, "{late:?}");
    drop(connect(&mesh, "client", held));
}

#[test]
fn agents_that_follow_each_other_leave_no_verdict_that_nobody_takes_back() {
    let (mesh, cluster, to) = started();
    let mut agent = cluster.culvert(&mesh, "a").unwrap();
    let world = cluster.plane(|plane| plane.world.clone()).unwrap();
    let policy = no_client();
    let hunt = Hunt::start(&mesh, "client", &to);
    let options = cluster.options(&mesh).unwrap();
    for round in 0..10 {
        // Verdicts are given and taken back all the while one agent hands over to the next.
        let new = mesh.start_agent("a", &options).unwrap();
        let mut old = std::mem::replace(&mut agent, new);
        wait::until("the take-over", TAKE_OVER, || {
            world.put_policy(&policy);
            wait::pass(WINDOW);
            world.remove_policy("shop/no-client");
            // The log is that of all agents so far.
            agent.log().matches("taken over from").count() > round
        })
        .unwrap();
        wait_ended(&mut old).unwrap();
        // Only the new one acknowledges now, and in the end all that came before.
        let mut before = 0;
        wait::until("the last of the changes", wait::SOON, || {
            wait::pass(WINDOW * 20);
            std::mem::replace(&mut before, world.accepted()) == world.accepted()
        })
        .unwrap();
        flip(&world, |world| world.put_policy(&policy));
        hunt.denied();
        wait::pass(WINDOW * 20);
        hunt.undone();
        flip(&world, |world| world.remove_policy("shop/no-client"));
        straight_again(&agent, 20).unwrap();
    }
    let tally = hunt.end();
    assert_eq!(tally.served_though_denied, 0, "{tally:?}");
    assert!(tally.denied >= 10 && tally.served >= 200, "{tally:?}");
}
