// Which of each request's drafts stand, and the token after them (arXiv 2211.17192; trees: arXiv 2305.09781).
//
// Drafts are a tree. Node 0 is the last token that a request has, the others are drafts, each after its parent.
// Row i of the target's distributions is what follows node i. The walk starts at node 0 and goes on to a child as
// long as one stands.
//
// Without the distributions that the drafts were drawn from, the token after a node is drawn by the node's random
// number, and the child that is this token stands. So the tokens are those that sampling one at a time gives with
// the same random numbers. With them, child x of q stands with probability p(x) / q(x); if it does not, p becomes
// what p has more than q, and the next child is tried. Either way the tokens are distributed as the target's.
#include "sampling.cuh"

struct Node {
    u32 token, parent;
    // Row of the distribution that the draft was drawn from.
    u32 from, unused;
    // Where the draws fall that decide whether it stands, and what follows: fractions of 2^64.
    u64 accept, random;
};

struct Request {
    // Its nodes, and the first one's row of the target.
    u32 node, count, row, unused;
};

struct Verified {
    // How many drafts stand, and the token after the last of them; ~0 if nothing is allowed there.
    u32 accepted, token;
};

struct Verify {
    const float *weights;
    const u64 *totals;
    // What drafts were drawn from; or null.
    const float *drafted;
    const u64 *drafted_totals;
    const Node *nodes;
    const Request *requests;
    // [requests][vocabulary], for this kernel to use; not read without `drafted`.
    float *work;
    // Beside `nodes`: the drafts of a request that stand, in order.
    u32 *path;
    Verified *out;
    u32 vocabulary, unused;
};

// A distribution: weights, and the sum of their masses.
struct Weights {
    const float *weight;
    u64 total;
    // What a weight is multiplied by to be a probability.
    FN float scale() const { return divide(0x1p40f, static_cast<float>(total)); }
};

FN u32 draw(Weights p, u32 n, u64 random) {
    return draw(n, multiply_high(p.total, random), [&](u32 i) { return mass(p.weight[i]); });
}

// What p has more than q, in `work`, which may be where p is. p stays if there is nothing.
FN Weights without(Weights p, Weights q, u32 n, float *work) {
    float p_scale = p.scale(), q_scale = q.scale();
    u64 sum = 0;
    block_sync();
    for (u32 i = thread_index(); i < n; i += BLOCK) sum += mass(most(p.weight[i] * p_scale - q.weight[i] * q_scale, 0.0f));
    sum = block_total(sum);
    if (sum == 0) return p;
    for (u32 i = thread_index(); i < n; i += BLOCK) work[i] = most(p.weight[i] * p_scale - q.weight[i] * q_scale, 0.0f);
    block_sync();
    return Weights{work, sum};
}

KERNEL(verify, Verify, BLOCK) {
    const Request request = p.requests[block_index()];
    const Node *nodes = p.nodes + request.node;
    u32 n = p.vocabulary, at = 0, accepted = 0, token = ~0u;
    for (bool stands = true; stands;) {
        u64 row = request.row + at;
        Weights target{p.weights + row * n, p.totals[row]};
        stands = false;
        token = ~0u;
        if (target.total == 0) break;
        if (!p.drafted) token = draw(target, n, nodes[at].random);
        for (u32 child = at + 1; child < request.count && !stands; ++child) {
            const Node &node = nodes[child];
            if (node.parent != at) continue;
            if (!p.drafted) {
                stands = node.token == token;
            } else {
                Weights drafted{p.drafted + static_cast<u64>(node.from) * n, p.drafted_totals[node.from]};
                float share = static_cast<float>(node.accept >> 40) * 0x1p-24f;
                float of_draft = drafted.weight[node.token] * drafted.scale();
                stands = share * of_draft < target.weight[node.token] * target.scale();
                if (!stands) target = without(target, drafted, n, p.work + static_cast<u64>(block_index()) * n);
            }
            if (!stands) continue;
            if (thread_index() == 0) p.path[request.node + accepted] = child;
            accepted += 1;
            at = child;
        }
        if (!stands && p.drafted) token = draw(target, n, nodes[at].random);
    }
    if (thread_index() == 0) p.out[block_index()] = Verified{accepted, token};
}
